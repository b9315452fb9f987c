// Command apply applies a layer with containerd's own applier (diff/apply, which a proxy snapshotter's mounts
// go through in containerd): to an overlay it writes straight into the upper layer, all else it mounts.
//
//	apply LAYER < MOUNTS
//
// LAYER is a tar, plain or gzip; MOUNTS a JSON list of {"type", "source", "options"}. It prints the digest of the
// uncompressed tar.
package main

import (
	"context"
	_ "crypto/sha256" // the digester looks it up by name
	"encoding/json"
	"fmt"
	"os"

	"github.com/containerd/containerd/content"
	"github.com/containerd/containerd/diff/apply"
	"github.com/containerd/containerd/mount"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: apply LAYER < MOUNTS")
		os.Exit(2)
	}
	if err := run(os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, "apply:", err)
		os.Exit(1)
	}
}

func run(layer string) error {
	var mounts []mount.Mount
	if err := json.NewDecoder(os.Stdin).Decode(&mounts); err != nil {
		return err
	}
	// The applier finds out by itself whether the layer is compressed.
	desc := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayerGzip}
	applied, err := apply.NewFileSystemApplier(file(layer)).Apply(context.Background(), desc, mounts)
	if err != nil {
		return err
	}
	fmt.Println(applied.Digest)
	return nil
}

// file is a content store with one blob, whatever digest is asked for.
type file string

func (f file) ReaderAt(context.Context, ocispec.Descriptor) (content.ReaderAt, error) {
	opened, err := os.Open(string(f))
	if err != nil {
		return nil, err
	}
	status, err := opened.Stat()
	if err != nil {
		opened.Close()
		return nil, err
	}
	return &reader{opened, status.Size()}, nil
}

type reader struct {
	*os.File
	size int64
}

func (r *reader) Size() int64 { return r.size }
