// Package quota stands in for github.com/docker/docker/quota, which Debian's package of Docker's sources leaves out
// and which its graph drivers import: with no project quotas anywhere.
package quota

import "errors"

// ErrQuotaNotSupported is what a filesystem without project quotas gives.
var ErrQuotaNotSupported = errors.New("filesystem does not support, or has not enabled quotas")

// Quota is a limit in bytes.
type Quota struct{ Size uint64 }

// Control would set quotas below a directory.
type Control struct{}

// NewControl fails.
func NewControl(string) (*Control, error) { return nil, ErrQuotaNotSupported }

// SetQuota fails.
func (*Control) SetQuota(string, Quota) error { return ErrQuotaNotSupported }

// GetQuota fails.
func (*Control) GetQuota(string, *Quota) error { return ErrQuotaNotSupported }
