// Command snapshotserver serves containerd's own overlay snapshotter on a unix socket, through containerd's
// contrib/snapshotservice: the peer of `onlap serve containerd` in bench/containerd.py, and the reference
// that the conformance test (tests/peers/go/conformance) is checked against.
//
//	snapshotserver [-async] ROOT SOCKET
//
// SIGTERM and SIGINT finish the calls under way, then it leaves with status 0.
package main

import (
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/signal"
	"syscall"

	api "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/contrib/snapshotservice"
	"github.com/containerd/containerd/defaults"
	"github.com/containerd/containerd/snapshots/overlay"
	"google.golang.org/grpc"
)

func main() {
	async := flag.Bool("async", false, "delete removed trees in Cleanup, the default of containerd's plugin")
	flag.Parse()
	if flag.NArg() != 2 {
		fmt.Fprintln(os.Stderr, "usage: snapshotserver [-async] ROOT SOCKET")
		os.Exit(2)
	}
	if err := serve(flag.Arg(0), flag.Arg(1), *async); err != nil {
		fmt.Fprintln(os.Stderr, "snapshotserver:", err)
		os.Exit(1)
	}
}

func serve(root, socket string, async bool) error {
	var opts []overlay.Opt
	if async {
		opts = append(opts, overlay.AsynchronousRemove)
	}
	snapshotter, err := overlay.NewSnapshotter(root, opts...)
	if err != nil {
		return err
	}
	defer snapshotter.Close()
	if err := os.Remove(socket); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	// Asked for before the socket exists: who sees the socket may send the signal at once.
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT)
	listener, err := net.Listen("unix", socket)
	if err != nil {
		return err
	}
	// containerd's own limits for messages.
	server := grpc.NewServer(
		grpc.MaxRecvMsgSize(defaults.DefaultMaxRecvMsgSize), grpc.MaxSendMsgSize(defaults.DefaultMaxSendMsgSize))
	api.RegisterSnapshotsServer(server, snapshotservice.FromSnapshotter(snapshotter))
	go func() {
		<-signals
		server.GracefulStop()
	}()
	return server.Serve(listener) // nil after GracefulStop, which has waited for the calls
}
