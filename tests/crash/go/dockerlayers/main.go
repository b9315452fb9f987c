// Command dockerlayers unpacks layers with Docker's overlay2, as dockerd does.
//
//	dockerlayers HOME MARKS TAR...   "layer-0", "layer-1", ..., one on the other
//
// Before and after each layer it writes a mark to the file MARKS.
package main

import (
	"fmt"
	"os"

	"github.com/docker/docker/daemon/graphdriver/overlay2"
	"github.com/docker/docker/pkg/idtools"
)

func main() {
	if err := unpack(os.Args[1], os.Args[2], os.Args[3:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func unpack(home, marks string, tars []string) error {
	driver, err := overlay2.Init(home, nil, idtools.IdentityMapping{})
	if err != nil {
		return err
	}
	parent := ""
	for i, tar := range tars {
		if err := os.WriteFile(marks, []byte(fmt.Sprintf("begun %d", i)), 0); err != nil {
			return err
		}
		id := fmt.Sprintf("layer-%d", i)
		if err := driver.Create(id, parent, nil); err != nil {
			return err
		}
		file, err := os.Open(tar)
		if err != nil {
			return err
		}
		if _, err := driver.ApplyDiff(id, parent, file); err != nil {
			return err
		}
		file.Close()
		if err := os.WriteFile(marks, []byte(fmt.Sprintf("done %d", i)), 0); err != nil {
			return err
		}
		parent = id
	}
	return driver.Cleanup()
}
