// Command containerdlayers unpacks layers into snapshots of containerd's overlay snapshotter, as containerd does.
//
//	containerdlayers unpack ROOT MARKS TAR...   "layer-0", "layer-1", ..., one on the other
//	containerdlayers look ROOT                  the layers' directories, topmost first, by name, as JSON
//
// Before and after each layer it writes a mark to the file MARKS.
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"strings"

	"github.com/containerd/containerd/archive"
	"github.com/containerd/containerd/mount"
	"github.com/containerd/containerd/snapshots"
	"github.com/containerd/containerd/snapshots/overlay"
)

func main() {
	var err error
	if os.Args[1] == "look" {
		err = look(os.Args[2])
	} else {
		err = unpack(os.Args[2], os.Args[3], os.Args[4:])
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func unpack(root, marks string, tars []string) error {
	ctx := context.Background()
	s, err := overlay.NewSnapshotter(root)
	if err != nil {
		return err
	}
	defer s.Close()
	parent := ""
	for i, tar := range tars {
		if err := os.WriteFile(marks, []byte(fmt.Sprintf("begun %d", i)), 0); err != nil {
			return err
		}
		key, name := fmt.Sprintf("key-%d", i), fmt.Sprintf("layer-%d", i)
		mounts, err := s.Prepare(ctx, key, parent)
		if err != nil {
			return err
		}
		file, err := os.Open(tar)
		if err != nil {
			return err
		}
		whiteouts := archive.WithConvertWhiteout(archive.OverlayConvertWhiteout)
		if _, err := archive.Apply(ctx, upper(mounts[0]), file, whiteouts); err != nil {
			return err
		}
		file.Close()
		if err := s.Commit(ctx, name, key); err != nil {
			return err
		}
		if err := os.WriteFile(marks, []byte(fmt.Sprintf("done %d", i)), 0); err != nil {
			return err
		}
		parent = name
	}
	return nil
}

// upper is where diff/apply writes (diff/apply/apply_linux.go).
func upper(m mount.Mount) string {
	for _, option := range m.Options {
		if dir, ok := strings.CutPrefix(option, "upperdir="); ok {
			return dir
		}
	}
	return m.Source
}

func look(root string) error {
	ctx := context.Background()
	s, err := overlay.NewSnapshotter(root)
	if err != nil {
		return err
	}
	defer s.Close()
	var names []string
	err = s.Walk(ctx, func(_ context.Context, info snapshots.Info) error {
		if info.Kind == snapshots.KindCommitted {
			names = append(names, info.Name)
		}
		return nil
	})
	if err != nil {
		return err
	}
	layers := map[string][]string{}
	for _, name := range names {
		mounts, err := s.View(ctx, "view of "+name, name)
		if err != nil { // its directory is gone
			layers[name] = []string{}
			continue
		}
		layers[name] = []string{mounts[0].Source}
		for _, option := range mounts[0].Options {
			if below, ok := strings.CutPrefix(option, "lowerdir="); ok {
				layers[name] = strings.Split(below, ":")
			}
		}
	}
	return json.NewEncoder(os.Stdout).Encode(layers)
}
