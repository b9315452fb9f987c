// Package graphtest points Docker's own suite for graph drivers (daemon/graphdriver/graphtest, unmodified) at a
// plugin behind a unix socket.
//
//	ONLAP_PLUGIN_SOCKET  where the plugin listens
//
// The suite asks for a driver by the name that it was registered with; the one that is registered here is what
// dockerd gets for a plugin, from the same function.
package graphtest

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/docker/docker/daemon/graphdriver"
	"github.com/docker/docker/daemon/graphdriver/graphtest"
	"github.com/docker/docker/pkg/idtools"
	"github.com/docker/docker/pkg/plugingetter"
	"github.com/docker/docker/pkg/plugins"
)

const registered = "behind-the-socket"

func init() {
	err := graphdriver.Register(registered, func(root string, options []string, ids idtools.IdentityMapping) (graphdriver.Driver, error) {
		return graphdriver.GetDriver("onlap", getter{os.Getenv("ONLAP_PLUGIN_SOCKET")}, graphdriver.Options{
			Root: filepath.Dir(root), DriverOptions: options, IDMap: ids, ExperimentalEnabled: true,
		})
	})
	if err != nil {
		panic(err)
	}
}

// getter finds the plugin where the environment says, not in /run/docker/plugins.
type getter struct{ socket string }

func (g getter) Get(name, _ string, _ int) (plugingetter.CompatPlugin, error) {
	client, err := plugins.NewClient("unix://"+g.socket, nil)
	if err != nil {
		return nil, err
	}
	var manifest plugins.Manifest
	if err := client.Call("Plugin.Activate", nil, &manifest); err != nil {
		return nil, err
	}
	return plugin{name, client}, nil
}

func (getter) GetAllByCap(string) ([]plugingetter.CompatPlugin, error)          { return nil, nil }
func (getter) GetAllManagedPluginsByCap(string) []plugingetter.CompatPlugin     { return nil }
func (getter) Handle(capability string, callback func(string, *plugins.Client)) {}

type plugin struct {
	name   string
	client *plugins.Client
}

func (p plugin) Name() string                { return p.name }
func (plugin) ScopedPath(path string) string { return path }
func (plugin) IsV1() bool                    { return true }
func (p plugin) Client() *plugins.Client     { return p.client }

// The driver lives from the first to the last of these, as in Docker's own tests of overlay2.

func TestSetup(t *testing.T) { graphtest.GetDriver(t, registered) }

func TestCreateEmpty(t *testing.T) { graphtest.DriverTestCreateEmpty(t, registered) }

func TestCreateBase(t *testing.T) { graphtest.DriverTestCreateBase(t, registered) }

func TestCreateSnap(t *testing.T) { graphtest.DriverTestCreateSnap(t, registered) }

func Test128LayerRead(t *testing.T) { graphtest.DriverTestDeepLayerRead(t, 128, registered) }

func TestDiffApply10Files(t *testing.T) { graphtest.DriverTestDiffApply(t, 10, registered) }

func TestChanges(t *testing.T) { graphtest.DriverTestChanges(t, registered) }

func TestTeardown(t *testing.T) { graphtest.PutDriver(t) }
