"""How often a layer is in use: Docker's rule (daemon/graphdriver/counter.go), threads, and what a crash leaves."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

from graphdriver_suite.cases import DriverSite, driver_case
from onlap.testing.site import check, equal
from onlap.testing.trees import Tree


def _stack(site: DriverSite) -> tuple[str, str]:
    base = site.image(tree=Tree().file("f", b"1"))
    return base, site.layer(base, writable=True)


@driver_case()
def the_last_put_unmounts(site: DriverSite) -> None:
    _, id = _stack(site)
    driver = site.driver
    path = driver.get(id)
    equal(driver.get(id), path, "where it is got again")
    driver.put(id)
    equal(os.listdir(path), ["f"], "what it shows while it is in use")
    driver.put(id)
    equal(site.mounted(), [], "what is mounted after the last put")
    check(not os.path.lexists(path), "the mount point is gone")
    driver.put(id)
    driver.put("nobody")
    with site.got(id) as again:
        equal(os.listdir(again), ["f"], "what it shows when it is got after that")


@driver_case()
def a_layer_without_a_parent_is_not_mounted(site: DriverSite) -> None:
    id = site.layer(tree=Tree().file("f"))
    path = site.driver.get(id)
    equal(os.listdir(path), ["f"], "what it shows")
    equal(site.mounted(), [], "what is mounted")
    site.driver.put(id)


@driver_case("counts")
def a_mount_that_was_left_is_taken_over(site: DriverSite) -> None:
    """The first touch of a mounted layer counts the mount as one use; a container may run in it."""
    _, id = _stack(site)
    path = site.driver.get(id)
    with open(os.path.join(path, "before"), "w") as file:
        file.write("1")
    site.reopen()
    equal(site.mounted(), [path], "what is mounted when the driver is opened again")
    equal(site.driver.get(id), path, "where it is got")
    equal(site.driver.counts, {id: 2}, "the counts")
    site.driver.put(id)
    equal(sorted(os.listdir(path)), ["before", "f"], "what it shows")
    site.driver.put(id)
    equal(site.mounted(), [], "what is mounted after the last put")


@driver_case("counts")
def a_put_of_a_mount_that_was_left_unmounts_it(site: DriverSite) -> None:
    _, id = _stack(site)
    site.driver.get(id)
    site.reopen()
    site.driver.put(id)
    equal(site.mounted(), [], "what is mounted")


@driver_case()
def cleanup_unmounts_and_keeps(site: DriverSite) -> None:
    _, id = _stack(site)
    path = site.driver.get(id)
    with open(os.path.join(path, "new"), "w") as file:
        file.write("1")
    site.driver.get(id)
    site.driver.cleanup()
    equal(site.mounted(), [], "what is mounted")
    with site.got(id) as again:
        equal(sorted(os.listdir(again)), ["f", "new"], "what it shows later")
    equal(site.mounted(), [], "what is mounted: the counts were forgotten")


@driver_case()
def somebody_elses_unmount_is_noticed(site: DriverSite) -> None:
    from onlap.mounts.unmount import unmount

    _, id = _stack(site)
    path = site.driver.get(id)
    unmount(path)
    equal(site.driver.get(id), path, "where it is got")
    equal(os.listdir(path), ["f"], "what it shows")
    site.driver.put(id)
    site.driver.put(id)
    equal(site.mounted(), [], "what is mounted")


@driver_case()
def threads_do_not_disturb_one_another(site: DriverSite) -> None:
    base, shared = _stack(site)
    failures: list[BaseException] = []

    def many(call: Callable[[int], None]) -> None:
        try:
            for number in range(15):
                call(number)
        except BaseException as error:  # noqa: BLE001 - raised again in the case's thread
            failures.append(error)

    def use(_number: int) -> None:
        with site.got(shared) as path:
            equal(os.listdir(path), ["f"], "what a shared layer shows")

    def make(thread: int, number: int) -> None:
        id = f"thread-{thread}-{number}"
        site.driver.create_read_write(id, base)
        with site.got(id) as path:
            (path / "own").write_bytes(b"1")
            equal(sorted(os.listdir(path)), ["f", "own"], "what a layer of one thread shows")
        equal(site.changes(id, base), [("/own", 1)], "the changes")
        site.driver.remove(id)

    threads = [threading.Thread(target=many, args=(use,)) for _ in range(4)]
    for each in range(4):
        threads.append(threading.Thread(target=many, args=(lambda number, each=each: make(each, number),)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    equal(site.mounted(), [], "what is mounted in the end")
