// Command graphbench times the calls of a graph driver: Docker's own overlay2 as a library, or a plugin by the proxy
// that dockerd uses. It reads a line of JSON a command and answers with one:
//
//	{"op": "open", "home": DIR}                     Docker's overlay2
//	{"op": "open", "home": DIR, "socket": PATH}     a plugin
//	{"op": "image", "layers": N, "tar": PATH}       N layers on one another, each applied from the archive
//	{"op": "cycles", "parent": ID, "count": N}      create, get, put and remove, N times
//	{"op": "apply", "parent": ID, "tar": PATH}      create, then apply
//	{"op": "diff", "id": ID, "parent": ID}          and its size
//	{"op": "exists", "id": ID, "count": N}          whether it exists, N times
//	{"op": "serve", "socket": PATH}                 be a plugin that does nothing, for others to ask: what a call costs
//	{"op": "drop"}                                  remove the layer that was made last
//	{"op": "clear"}                                 remove all layers, and clean up
//
// Times are in seconds.
package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"github.com/docker/docker/daemon/graphdriver"
	"github.com/docker/docker/daemon/graphdriver/overlay2"
	"github.com/docker/docker/pkg/idtools"
	"github.com/docker/docker/pkg/plugingetter"
	"github.com/docker/docker/pkg/plugins"
)

type command struct {
	Op, Home, Socket, Tar, Parent, ID string
	Layers, Count                     int
}

type answer map[string]any

type bench struct {
	driver graphdriver.Driver
	ids    []string
}

func main() {
	var b bench
	input := bufio.NewScanner(os.Stdin)
	for input.Scan() {
		var c command
		result, err := answer(nil), json.Unmarshal(input.Bytes(), &c)
		if err == nil {
			result, err = b.run(c)
		}
		if err != nil {
			result = answer{"error": err.Error()}
		}
		line, _ := json.Marshal(result)
		fmt.Println(string(line))
	}
}

func (b *bench) run(c command) (answer, error) {
	switch c.Op {
	case "open":
		return answer{}, b.open(c)
	case "image":
		parent := ""
		for range c.Layers {
			id := b.id()
			if err := b.driver.Create(id, parent, nil); err != nil {
				return nil, err
			}
			if err := b.apply(id, parent, c.Tar); err != nil {
				return nil, err
			}
			parent = id
		}
		return answer{"id": parent, "below": b.ids[max(len(b.ids)-2, 0)]}, nil
	case "cycles":
		return b.cycles(c)
	case "apply":
		id := b.id()
		if err := b.driver.Create(id, c.Parent, nil); err != nil {
			return nil, err
		}
		start := time.Now()
		err := b.apply(id, c.Parent, c.Tar)
		return answer{"apply": time.Since(start).Seconds(), "id": id}, err
	case "diff":
		return b.diff(c)
	case "exists":
		start := time.Now()
		for range c.Count {
			b.driver.Exists(c.ID)
		}
		return answer{"exists": time.Since(start).Seconds() / float64(c.Count)}, nil
	case "serve":
		listener, err := net.Listen("unix", c.Socket)
		if err == nil {
			go http.Serve(listener, http.HandlerFunc(empty))
		}
		return answer{}, err
	case "drop":
		last := b.ids[len(b.ids)-1]
		b.ids = b.ids[:len(b.ids)-1]
		return answer{}, b.driver.Remove(last)
	case "clear":
		for i := len(b.ids) - 1; i >= 0; i-- {
			if err := b.driver.Remove(b.ids[i]); err != nil {
				return nil, err
			}
		}
		b.ids = nil
		return answer{}, b.driver.Cleanup()
	}
	return nil, fmt.Errorf("no such command: %s", c.Op)
}

func (b *bench) open(c command) (err error) {
	if c.Socket == "" {
		b.driver, err = overlay2.Init(c.Home, nil, idtools.IdentityMapping{})
		return err
	}
	b.driver, err = graphdriver.GetDriver(filepath.Base(c.Home), getter{c.Socket}, graphdriver.Options{
		Root: filepath.Dir(c.Home), ExperimentalEnabled: true,
	})
	return err
}

func (b *bench) id() string {
	id := fmt.Sprintf("%064x", time.Now().UnixNano())
	b.ids = append(b.ids, id)
	return id
}

func (b *bench) apply(id, parent, path string) error {
	file, err := os.Open(path)
	if err != nil {
		return err
	}
	defer file.Close()
	_, err = b.driver.ApplyDiff(id, parent, file)
	return err
}

// cycles times each call over all rounds: what containers do.
func (b *bench) cycles(c command) (answer, error) {
	spent := map[string]time.Duration{}
	for range c.Count {
		id := fmt.Sprintf("%064x", time.Now().UnixNano())
		for _, step := range []struct {
			name string
			call func() error
		}{
			{"create", func() error { return b.driver.CreateReadWrite(id, c.Parent, nil) }},
			{"get", func() error { _, err := b.driver.Get(id, ""); return err }},
			{"put", func() error { return b.driver.Put(id) }},
			{"remove", func() error { return b.driver.Remove(id) }},
		} {
			start := time.Now()
			if err := step.call(); err != nil {
				return nil, fmt.Errorf("%s: %w", step.name, err)
			}
			spent[step.name] += time.Since(start)
		}
	}
	result := answer{}
	for name, total := range spent {
		result[name] = total.Seconds() / float64(c.Count)
	}
	return result, nil
}

func (b *bench) diff(c command) (answer, error) {
	start := time.Now()
	stream, err := b.driver.Diff(c.ID, c.Parent)
	if err != nil {
		return nil, err
	}
	size, err := io.Copy(io.Discard, stream)
	if err != nil {
		return nil, err
	}
	if err := stream.Close(); err != nil {
		return nil, err
	}
	diff := time.Since(start)
	start = time.Now()
	_, err = b.driver.DiffSize(c.ID, c.Parent)
	diffSize := time.Since(start)
	start = time.Now()
	if err == nil {
		_, err = b.driver.Changes(c.ID, c.Parent)
	}
	return answer{
		"diff": diff.Seconds(), "diff_size": diffSize.Seconds(), "changes": time.Since(start).Seconds(), "bytes": size,
	}, err
}

// empty answers every call as a graph driver that has nothing to do.
func empty(w http.ResponseWriter, r *http.Request) {
	io.Copy(io.Discard, r.Body)
	fmt.Fprint(w, `{"Implements": ["GraphDriver"], "Exists": true}`)
}

// getter finds the plugin where it is told, not in /run/docker/plugins.
type getter struct{ socket string }

func (g getter) Get(name, _ string, _ int) (plugingetter.CompatPlugin, error) {
	client, err := plugins.NewClient("unix://"+g.socket, nil)
	return plugin{name, client}, err
}

func (getter) GetAllByCap(string) ([]plugingetter.CompatPlugin, error)      { return nil, nil }
func (getter) GetAllManagedPluginsByCap(string) []plugingetter.CompatPlugin { return nil }
func (getter) Handle(string, func(string, *plugins.Client))                 {}

type plugin struct {
	name   string
	client *plugins.Client
}

func (p plugin) Name() string                { return p.name }
func (plugin) ScopedPath(path string) string { return path }
func (plugin) IsV1() bool                    { return true }
func (p plugin) Client() *plugins.Client     { return p.client }
