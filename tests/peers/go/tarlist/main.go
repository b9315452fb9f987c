// Command tarlist says how Go's archive/tar reads archives: containerd, Docker and scanners read layers with it.
//
// It takes archives from standard input, each after its length (4 bytes, big endian), and answers each with a line of
// JSON: the entries up to the end or the first error, and that error. Bytes are hexadecimal.
package main

import (
	"archive/tar"
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"
)

const xattr = "SCHILY.xattr."

// What is longer is said by its size alone: a sparse file of a few bytes may have exabytes.
const longest = 1 << 22

type entry struct {
	Type           string
	Name, Link     string
	Size, Mode     int64
	Uid, Gid       int
	Seconds, Nanos int64
	Major, Minor   int64
	Xattrs         map[string]string
	Content        string
}

type listing struct {
	Entries []entry
	Error   string
}

func main() {
	in := bufio.NewReader(os.Stdin)
	out := json.NewEncoder(os.Stdout)
	for {
		var length uint32
		err := binary.Read(in, binary.BigEndian, &length)
		if err == io.EOF {
			return
		}
		data := make([]byte, length)
		if err == nil {
			_, err = io.ReadFull(in, data)
		}
		if err == nil {
			err = out.Encode(list(data))
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, "tarlist:", err)
			os.Exit(1)
		}
	}
}

func list(data []byte) listing {
	var found listing
	// Without Seek, as a layer is read.
	reader := tar.NewReader(struct{ io.Reader }{bytes.NewReader(data)})
	for {
		header, err := reader.Next()
		if err == io.EOF {
			return found
		}
		if err == nil {
			var read entry
			if read, err = describe(reader, header); err == nil {
				found.Entries = append(found.Entries, read)
			}
		}
		if err != nil {
			found.Error = err.Error()
			return found
		}
	}
}

func describe(reader *tar.Reader, header *tar.Header) (entry, error) {
	read := entry{
		Type: string(rune(header.Typeflag)), Name: text(header.Name), Link: text(header.Linkname),
		Size: header.Size, Mode: header.Mode & 0o7777, Uid: header.Uid, Gid: header.Gid,
		Seconds: header.ModTime.Unix(), Nanos: int64(header.ModTime.Nanosecond()),
		Major: header.Devmajor, Minor: header.Devminor, Xattrs: map[string]string{},
	}
	// As containerd and Docker do; Header.Xattrs leaves those without a value out.
	for key, value := range header.PAXRecords {
		if name, ok := strings.CutPrefix(key, xattr); ok {
			read.Xattrs[text(name)] = text(value)
		}
	}
	if header.Size > longest {
		return read, nil
	}
	sum := sha256.New()
	if _, err := io.Copy(sum, reader); err != nil {
		return read, err
	}
	read.Content = hex.EncodeToString(sum.Sum(nil))
	return read, nil
}

func text(value string) string { return hex.EncodeToString([]byte(value)) }
