// Command snapshotclient loads a server of containerd's Snapshots service and prints what it measured as one
// JSON object: the client of bench/containerd.py, the same for every server.
//
//	snapshotclient -socket S [-clients N] [-share] [-seconds T] [-live K]
//
// A cycle is what containerd does for a layer or a container, seen from the snapshotter: prepare, stat,
// mounts, commit, remove. Each client has a connection of its own, unless -share (a containerd has one).
// -live makes K snapshots first (those that are there already count) and leaves them. At the end Cleanup is
// called and timed; a server that has none may say Unimplemented.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"sort"
	"strings"
	"sync"
	"time"

	api "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/defaults"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
)

const (
	snapshotter = "bench"
	base        = "default/1/base" // containerd's keys: namespace/sequence/key
	livePrefix  = "default/live/"
)

// calls are the steps of a cycle, in order.
var calls = []string{"prepare", "stat", "mounts", "commit", "remove"}

func main() {
	socket := flag.String("socket", "", "the server's unix socket")
	clients := flag.Int("clients", 1, "concurrent clients")
	share := flag.Bool("share", false, "one connection for all clients")
	seconds := flag.Float64("seconds", 3, "length of the timed loop")
	live := flag.Int("live", 0, "snapshots that exist before the loop starts")
	flag.Parse()
	if *socket == "" || flag.NArg() != 0 {
		flag.Usage()
		os.Exit(2)
	}
	result, err := run(*socket, *clients, *share, time.Duration(*seconds*float64(time.Second)), *live)
	if err == nil {
		err = json.NewEncoder(os.Stdout).Encode(result)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "snapshotclient:", err)
		os.Exit(1)
	}
}

func run(socket string, clients int, share bool, length time.Duration, live int) (map[string]any, error) {
	connections := clients
	if share {
		connections = 1
	}
	stubs := make([]api.SnapshotsClient, connections)
	for i := range stubs {
		conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(defaults.DefaultMaxRecvMsgSize)))
		if err != nil {
			return nil, err
		}
		defer conn.Close()
		stubs[i] = api.NewSnapshotsClient(conn)
	}
	ctx := context.Background()
	if err := makeBase(ctx, stubs[0]); err != nil {
		return nil, err
	}
	if err := makeLive(ctx, stubs, live); err != nil {
		return nil, err
	}
	for _, stub := range stubs { // connect before the clock starts
		if _, err := stub.Stat(ctx, &api.StatSnapshotRequest{Snapshotter: snapshotter, Key: base}); err != nil {
			return nil, err
		}
	}

	var mu sync.Mutex
	took := make([][]time.Duration, len(calls))
	start := time.Now()
	group, gctx := errgroup.WithContext(ctx)
	for c := 0; c < clients; c++ {
		c, stub := c, stubs[c%connections]
		group.Go(func() error {
			own := make([][]time.Duration, len(calls)) // merged at the end: no lock inside the loop
			for n := 0; time.Since(start) < length; n++ {
				if err := cycle(gctx, stub, c, n, own); err != nil {
					return fmt.Errorf("client %d, cycle %d: %w", c, n, err)
				}
			}
			mu.Lock()
			defer mu.Unlock()
			for i := range took {
				took[i] = append(took[i], own[i]...)
			}
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		return nil, err
	}
	elapsed := time.Since(start).Seconds()
	result := map[string]any{
		"clients": clients, "connections": connections, "live": live, "seconds": elapsed,
		"cycles": len(took[0]), "cycles_per_second": float64(len(took[0])) / elapsed,
	}
	for i, name := range calls {
		result[name+"_ms"] = percentiles(took[i])
	}
	cleanup := time.Now()
	_, err := stubs[0].Cleanup(ctx, &api.CleanupRequest{Snapshotter: snapshotter})
	if err != nil && status.Code(err) != codes.Unimplemented {
		return nil, err
	}
	result["cleanup_ms"] = ms(time.Since(cleanup))
	return result, nil
}

// cycle makes one cycle and appends the time of each call to took. The process id keeps keys apart when
// several of these programs load one server.
func cycle(ctx context.Context, s api.SnapshotsClient, client, n int, took [][]time.Duration) error {
	key := fmt.Sprintf("default/%d/extract-%d-%d sha256:%064x", n, os.Getpid(), client, n)
	name := fmt.Sprintf("default/%d/sha256:%016x%016x%032x", n, os.Getpid(), client, n)
	steps := []func() error{
		func() error {
			_, err := s.Prepare(ctx, &api.PrepareSnapshotRequest{Snapshotter: snapshotter, Key: key, Parent: base})
			return err
		},
		func() error {
			_, err := s.Stat(ctx, &api.StatSnapshotRequest{Snapshotter: snapshotter, Key: key})
			return err
		},
		func() error {
			_, err := s.Mounts(ctx, &api.MountsRequest{Snapshotter: snapshotter, Key: key})
			return err
		},
		func() error {
			_, err := s.Commit(ctx, &api.CommitSnapshotRequest{Snapshotter: snapshotter, Name: name, Key: key})
			return err
		},
		func() error {
			_, err := s.Remove(ctx, &api.RemoveSnapshotRequest{Snapshotter: snapshotter, Key: name})
			return err
		},
	}
	for i, step := range steps {
		t0 := time.Now()
		if err := step(); err != nil {
			return fmt.Errorf("%s: %w", calls[i], err)
		}
		took[i] = append(took[i], time.Since(t0))
	}
	return nil
}

// makeBase commits the snapshot that every prepare is based on, unless an earlier run has.
func makeBase(ctx context.Context, s api.SnapshotsClient) error {
	_, err := s.Stat(ctx, &api.StatSnapshotRequest{Snapshotter: snapshotter, Key: base})
	if status.Code(err) != codes.NotFound {
		return err
	}
	const key = "default/0/making base"
	if _, err := s.Prepare(ctx, &api.PrepareSnapshotRequest{Snapshotter: snapshotter, Key: key}); err != nil {
		return err
	}
	_, err = s.Commit(ctx, &api.CommitSnapshotRequest{Snapshotter: snapshotter, Name: base, Key: key})
	return err
}

// makeLive prepares the live snapshots that the server does not have yet, eight at a time.
func makeLive(ctx context.Context, stubs []api.SnapshotsClient, live int) error {
	if live == 0 {
		return nil
	}
	have := make(map[string]bool)
	stream, err := stubs[0].List(ctx, &api.ListSnapshotsRequest{Snapshotter: snapshotter})
	for err == nil {
		var block *api.ListSnapshotsResponse
		if block, err = stream.Recv(); err == nil {
			for _, info := range block.Info {
				if strings.HasPrefix(info.Name, livePrefix) {
					have[info.Name] = true
				}
			}
		}
	}
	if !errors.Is(err, io.EOF) {
		return err
	}
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(8)
	for n := 0; n < live; n++ {
		key, stub := fmt.Sprintf("%s%d", livePrefix, n), stubs[n%len(stubs)]
		if have[key] {
			continue
		}
		group.Go(func() error {
			_, err := stub.Prepare(ctx,
				&api.PrepareSnapshotRequest{Snapshotter: snapshotter, Key: key, Parent: base})
			return err
		})
	}
	return group.Wait()
}

func ms(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

// percentiles gives [p50, p99] in milliseconds; it sorts d.
func percentiles(d []time.Duration) []float64 {
	if len(d) == 0 {
		return []float64{0, 0}
	}
	sort.Slice(d, func(i, j int) bool { return d[i] < d[j] })
	return []float64{ms(d[len(d)/2]), ms(d[len(d)*99/100])}
}
