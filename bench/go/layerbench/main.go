// Command layerbench applies and writes layers with containerd's archive package, for bench/layers.py to time
// beside Onlap's.
//
// It answers each line of JSON on stdin with one on stdout, until they end.
//
//	{"op":"hello"}                                     its name and version
//	{"op":"apply","dir":D,"tar":T}                     apply T to D, as containerd does to an overlay's upperdir
//	{"op":"unpack","dir":D,"tar":T}                    the same with the digests of T and of the plain archive in it
//	{"op":"diff","lower":L,"upper":U,"tar":T}          write how the tree U differs from the tree L to T, with its digest
//
// The answers hold "seconds"; an error is {"error": text}.
package main

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"hash"
	"io"
	"os"
	"runtime"
	"time"

	"github.com/containerd/containerd/archive"
	"github.com/containerd/containerd/archive/compression"
	"github.com/containerd/containerd/version"
)

type command struct {
	Op, Dir, Tar, Lower, Upper string
}

type answer map[string]any

func main() {
	in, out := bufio.NewScanner(os.Stdin), json.NewEncoder(os.Stdout)
	for in.Scan() {
		var c command
		a, err := answer{}, json.Unmarshal(in.Bytes(), &c)
		if err == nil {
			a, err = operate(c)
		}
		if err != nil {
			a = answer{"error": err.Error()}
		}
		if err := out.Encode(a); err != nil {
			os.Exit(1)
		}
	}
}

func operate(c command) (answer, error) {
	began := time.Now()
	var err error
	switch c.Op {
	case "hello":
		return answer{"name": "containerd " + version.Version, "runtime": runtime.Version()}, nil
	case "apply":
		err = apply(c.Dir, c.Tar, nil, nil)
	case "unpack":
		err = apply(c.Dir, c.Tar, sha256.New(), sha256.New())
	case "diff":
		err = diff(c.Lower, c.Upper, c.Tar)
	default:
		err = fmt.Errorf("no such operation: %q", c.Op)
	}
	return answer{"seconds": time.Since(began).Seconds()}, err
}

// apply is what diff/apply does with an overlay's upperdir; the digest of the blob is what fetching it computes.
func apply(directory, name string, packed, plain hash.Hash) error {
	file, err := os.Open(name)
	if err != nil {
		return err
	}
	defer file.Close()
	var source io.Reader = file
	if packed != nil {
		source = io.TeeReader(file, packed)
	}
	stream, err := compression.DecompressStream(source)
	if err != nil {
		return err
	}
	defer stream.Close()
	var unpacked io.Reader = stream
	if plain != nil {
		unpacked = io.TeeReader(stream, plain)
	}
	whiteouts := archive.WithConvertWhiteout(archive.OverlayConvertWhiteout)
	if _, err := archive.Apply(context.Background(), directory, unpacked, whiteouts); err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, unpacked)
	return err
}

func diff(lower, upper, name string) error {
	file, err := os.Create(name)
	if err != nil {
		return err
	}
	digest := sha256.New()
	if err := archive.WriteDiff(context.Background(), io.MultiWriter(file, digest), lower, upper); err != nil {
		file.Close()
		return err
	}
	return file.Close()
}
