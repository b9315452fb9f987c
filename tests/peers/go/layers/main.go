// Command layers applies and writes layers with containerd's archive package, on directories.
//
//	layers apply DIR TAR       apply TAR, plain or compressed, to the tree in DIR, as to a mounted one
//	layers diff LOWER UPPER    write how the tree UPPER differs from LOWER to standard output
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/containerd/containerd/archive"
	"github.com/containerd/containerd/archive/compression"
)

func main() {
	if len(os.Args) != 4 {
		fmt.Fprintln(os.Stderr, "usage: layers apply DIR TAR | layers diff LOWER UPPER")
		os.Exit(2)
	}
	if err := run(os.Args[1], os.Args[2], os.Args[3]); err != nil {
		fmt.Fprintln(os.Stderr, "layers:", err)
		os.Exit(1)
	}
}

func run(verb, one, other string) error {
	switch verb {
	case "apply":
		return apply(one, other)
	case "diff":
		return archive.WriteDiff(context.Background(), os.Stdout, one, other)
	}
	return errors.New("no such command: " + verb)
}

func apply(directory, name string) error {
	file, err := os.Open(name)
	if err != nil {
		return err
	}
	defer file.Close()
	plain, err := compression.DecompressStream(file)
	if err != nil {
		return err
	}
	defer plain.Close()
	if _, err := archive.Apply(context.Background(), directory, plain); err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, plain)
	return err
}
