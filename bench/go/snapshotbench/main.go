// Command snapshotbench runs containerd's own overlay snapshotter as a library, for bench/snapshots.py to
// time beside Onlap's.
//
// It answers each line of JSON on stdin with one on stdout, until they end, so that the bench can interleave
// its runs with those of its own worker, which speaks the same lines. Each command opens the snapshotter at
// "root" and closes it again; "async" is the asynchronous form of Remove (the default of containerd's
// plugin), in which Cleanup deletes the tree.
//
//	{"op":"hello"}                                                    its name and version
//	{"op":"cycles","root":R,"threads":N,"seconds":S,"async":B}        prepare + commit + remove in a loop
//	{"op":"slow_prepare","root":R,"files":F,"seconds":S,"async":B}    prepares beside the commit of F files
//	{"op":"remove_live","root":R,"live":K,"count":N,"async":B}        N removes with K other snapshots
//
// Times in the answers are milliseconds, a pair [p50, p99] where many calls were made; an error is
// {"error": text}.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"time"

	"github.com/containerd/containerd/errdefs"
	"github.com/containerd/containerd/snapshots"
	"github.com/containerd/containerd/snapshots/overlay"
	"github.com/containerd/containerd/version"
	"golang.org/x/sync/errgroup"
)

// base is the committed snapshot that every prepare is based on.
const base = "base"

type command struct {
	Op, Root                    string
	Async                       bool
	Threads, Files, Live, Count int
	Seconds                     float64
}

type answer map[string]any
type operation func(context.Context, snapshots.Snapshotter, command) (answer, error)

func main() {
	ops := map[string]operation{"cycles": cycles, "slow_prepare": slowPrepare, "remove_live": removeLive}
	in, out := bufio.NewScanner(os.Stdin), json.NewEncoder(os.Stdout)
	for in.Scan() {
		var c command
		a := answer{"name": "containerd " + version.Version, "runtime": runtime.Version()}
		err := json.Unmarshal(in.Bytes(), &c)
		if op, ok := ops[c.Op]; ok {
			a, err = with(c, op)
		} else if c.Op != "hello" {
			err = errors.Join(err, fmt.Errorf("unknown op %q", c.Op))
		}
		if err != nil {
			a = answer{"error": err.Error()}
		}
		if err := out.Encode(a); err != nil {
			os.Exit(1) // nobody reads any more
		}
	}
}

// with opens the snapshotter, makes the base on first use, runs op, and times the Cleanup that follows.
// Garbage never stays behind: the synchronous Remove of a later command would delete it on its own clock.
func with(c command, op operation) (answer, error) {
	ctx := context.Background()
	var opts []overlay.Opt
	if c.Async {
		opts = append(opts, overlay.AsynchronousRemove)
	}
	s, err := overlay.NewSnapshotter(c.Root, opts...)
	if err != nil {
		return nil, err
	}
	defer s.Close()
	if _, err := s.Stat(ctx, base); errdefs.IsNotFound(err) {
		_, perr := s.Prepare(ctx, "making-base", "")
		if err := errors.Join(perr, s.Commit(ctx, base, "making-base")); err != nil {
			return nil, err
		}
	}
	a, err := op(ctx, s, c)
	if err != nil {
		return nil, err
	}
	start := time.Now()
	err = s.(snapshots.Cleaner).Cleanup(ctx)
	a["cleanup_ms"] = ms(time.Since(start))
	return a, err
}

// cycles: each of c.Threads goroutines prepares, commits and removes until the time is over.
func cycles(ctx context.Context, s snapshots.Snapshotter, c command) (answer, error) {
	own := make([][3][]time.Duration, c.Threads) // a slot a goroutine: no lock inside the loop
	start := time.Now()
	group, ctx := errgroup.WithContext(ctx)
	for t := range own {
		group.Go(func() error {
			for n := 0; time.Since(start) < seconds(c.Seconds); n++ {
				key, name := fmt.Sprintf("key-%d-%d", t, n), fmt.Sprintf("name-%d-%d", t, n)
				t0 := time.Now()
				if _, err := s.Prepare(ctx, key, base); err != nil {
					return err
				}
				t1 := time.Now()
				if err := s.Commit(ctx, name, key); err != nil {
					return err
				}
				t2 := time.Now()
				if err := s.Remove(ctx, name); err != nil {
					return err
				}
				for i, d := range []time.Duration{t1.Sub(t0), t2.Sub(t1), time.Since(t2)} {
					own[t][i] = append(own[t][i], d)
				}
			}
			return nil
		})
	}
	err := group.Wait()
	a := answer{"seconds": time.Since(start).Seconds()}
	for i, call := range []string{"prepare_ms", "commit_ms", "remove_ms"} {
		var all []time.Duration
		for t := range own {
			all = append(all, own[t][i]...)
		}
		a["cycles"], a[call] = len(all), percentiles(all)
	}
	return a, err
}

// slowPrepare commits a snapshot of c.Files files while another goroutine prepares in a loop, and goes on
// preparing for c.Seconds after the commit: work that an implementation puts off until after its commit
// counts too.
func slowPrepare(ctx context.Context, s snapshots.Snapshotter, c command) (answer, error) {
	mounts, err := s.Prepare(ctx, "big-key", "")
	if err != nil {
		return nil, err
	}
	// Without a parent the mount is a bind of the upper directory, so that the files need no mount.
	if err := fill(mounts[0].Source, c.Files); err != nil {
		return nil, err
	}
	// Measured is the snapshotter, not the write-back of the new files.
	if err := exec.Command("sync", "-f", c.Root).Run(); err != nil {
		return nil, err
	}

	warm, stop := make(chan struct{}), make(chan struct{})
	var took []time.Duration
	prepared := 0
	group, gctx := errgroup.WithContext(ctx)
	group.Go(func() error {
		for ; ; prepared++ {
			select {
			case <-stop:
				return nil
			default:
			}
			t0 := time.Now()
			if _, err := s.Prepare(gctx, fmt.Sprintf("small-%d", prepared), base); err != nil {
				return err
			}
			took = append(took, time.Since(t0))
			if prepared == 20 { // the first prepares find cold caches; they do not count
				took = nil
				close(warm)
			}
		}
	})
	select {
	case <-warm:
	case <-gctx.Done():
		return nil, group.Wait()
	}
	start := time.Now()
	err = s.Commit(ctx, "big", "big-key")
	commit := time.Since(start)
	time.Sleep(seconds(c.Seconds))
	close(stop)
	if err := errors.Join(err, group.Wait()); err != nil {
		return nil, err
	}
	a := answer{"commit_ms": ms(commit), "slowest_ms": ms(slices.Max(took)), "prepare_ms": percentiles(took)}
	err = s.Remove(ctx, "big")
	for n := 0; err == nil && n < prepared; n++ {
		err = s.Remove(ctx, fmt.Sprintf("small-%d", n))
	}
	return a, err
}

// removeLive times each of c.Count removes beside c.Live snapshots that stay. Those are made once a root.
func removeLive(ctx context.Context, s snapshots.Snapshotter, c command) (answer, error) {
	for n := 0; n < c.Live; n++ {
		if _, err := s.Prepare(ctx, fmt.Sprintf("live-%d", n), base); err != nil && !errdefs.IsAlreadyExists(err) {
			return nil, err
		}
	}
	for n := 0; n < c.Count; n++ {
		if _, err := s.Prepare(ctx, fmt.Sprintf("victim-%d", n), base); err != nil {
			return nil, err
		}
	}
	if err := exec.Command("sync", "-f", c.Root).Run(); err != nil {
		return nil, err
	}
	took := make([]time.Duration, c.Count)
	for n := range took {
		t0 := time.Now()
		if err := s.Remove(ctx, fmt.Sprintf("victim-%d", n)); err != nil {
			return nil, err
		}
		took[n] = time.Since(t0)
	}
	return answer{"remove_ms": percentiles(took)}, nil
}

// fill makes n empty files below dir, 500 a directory.
func fill(dir string, n int) (err error) {
	for i := 0; err == nil && i < n; i++ {
		sub := filepath.Join(dir, fmt.Sprintf("d%04d", i/500))
		if i%500 == 0 {
			err = os.Mkdir(sub, 0o755)
		}
		err = errors.Join(err, os.WriteFile(filepath.Join(sub, fmt.Sprintf("f%03d", i%500)), nil, 0o644))
	}
	return err
}

func seconds(s float64) time.Duration { return time.Duration(s * float64(time.Second)) }

func ms(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

// percentiles gives [p50, p99] in milliseconds; it sorts d.
func percentiles(d []time.Duration) []float64 {
	if len(d) == 0 {
		return nil
	}
	slices.Sort(d)
	return []float64{ms(d[len(d)/2]), ms(d[len(d)*99/100])}
}
