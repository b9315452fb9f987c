// Package conformance points containerd's own snapshotter suite (snapshots/testsuite of containerd 1.7, 21
// subtests) at a server behind a unix socket.
//
//	ONLAP_SERVER      shell command that starts a server in the foreground on $SOCK, with its store in $ROOT
//	                  (a plain command: it is run by exec, so that signals reach the server itself)
//	ONLAP_SUITE_NAME  the name that the suite knows the snapshotter by; "overlayfs" (the default) skips the
//	                  rename of a directory that lies in a lower layer, as it does for containerd's own
//
// The suite starts one server a subtest. Mounting needs privilege and the flag -test.root.
package conformance

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	api "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/pkg/testutil"
	"github.com/containerd/containerd/snapshots"
	"github.com/containerd/containerd/snapshots/proxy"
	"github.com/containerd/containerd/snapshots/testsuite"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

// patience is how long a server may take to answer on its socket, and to leave after SIGTERM.
const patience = 30 * time.Second

func TestSnapshotterBehindSocket(t *testing.T) {
	testutil.RequiresRoot(t)
	command := os.Getenv("ONLAP_SERVER")
	if command == "" {
		t.Fatal("ONLAP_SERVER is not set: give the shell command that serves $ROOT on $SOCK")
	}
	name := os.Getenv("ONLAP_SUITE_NAME")
	if name == "" {
		name = "overlayfs"
	}
	testsuite.SnapshotterSuite(t, name,
		func(ctx context.Context, root string) (snapshots.Snapshotter, func() error, error) {
			return start(ctx, command, root)
		})
}

// server is a running process; its exit is awaited once, in the background, so that both the wait for the
// socket and the stop can watch it.
type server struct {
	process *os.Process
	exited  chan struct{} // closed when status is set
	status  error         // of Wait: nil after exit 0
}

// start runs the command and returns the snapshotter behind its socket, and what stops it.
func start(ctx context.Context, command, root string) (snapshots.Snapshotter, func() error, error) {
	socket := filepath.Join(filepath.Dir(root), "s.sock") // short: a unix address has 108 bytes
	cmd := exec.Command("/bin/sh", "-c", "exec "+command)
	cmd.Env = append(os.Environ(), "SOCK="+socket, "ROOT="+root)
	cmd.Stdout, cmd.Stderr = os.Stderr, os.Stderr
	if err := cmd.Start(); err != nil {
		return nil, nil, err
	}
	s := &server{process: cmd.Process, exited: make(chan struct{})}
	go func() {
		s.status = cmd.Wait()
		close(s.exited)
	}()
	if err := s.awaitSocket(ctx, socket); err != nil {
		return nil, nil, errors.Join(err, s.kill())
	}
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, nil, errors.Join(err, s.kill())
	}
	stop := func() error { return errors.Join(conn.Close(), s.terminate()) }
	return proxy.NewSnapshotter(api.NewSnapshotsClient(conn), "onlap"), stop, nil
}

// awaitSocket returns when somebody accepts on the socket. Connecting is the test, not the file: a socket's
// file exists between bind and listen, when connecting is still refused.
func (s *server) awaitSocket(ctx context.Context, socket string) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	retry := time.NewTicker(5 * time.Millisecond)
	defer retry.Stop()
	for {
		conn, err := (&net.Dialer{}).DialContext(ctx, "unix", socket)
		if err == nil {
			return conn.Close()
		}
		select {
		case <-s.exited:
			return fmt.Errorf("the server ended before it listened on %s: %w", socket, s.reason())
		case <-ctx.Done():
			return fmt.Errorf("no server on %s after %s: %w", socket, patience, err)
		case <-retry.C:
		}
	}
}

// terminate sends SIGTERM; a server must then leave with status 0.
func (s *server) terminate() error {
	if err := s.process.Signal(syscall.SIGTERM); err != nil {
		return fmt.Errorf("the server was gone before SIGTERM (%w): %w", err, s.reason())
	}
	select {
	case <-s.exited:
		if s.status != nil {
			return fmt.Errorf("after SIGTERM the server must leave with status 0: %w", s.status)
		}
		return nil
	case <-time.After(patience):
		return errors.Join(fmt.Errorf("the server still runs %s after SIGTERM", patience), s.kill())
	}
}

// kill ends a server that is of no use any more, and waits until it is gone.
func (s *server) kill() error {
	if err := s.process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	<-s.exited
	return nil
}

// reason waits for the exit and says how it went; never nil, so that it can be wrapped.
func (s *server) reason() error {
	<-s.exited
	if s.status == nil {
		return errors.New("exit status 0")
	}
	return s.status
}
