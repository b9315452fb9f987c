// Command bolt writes and reads databases with bbolt itself, for the tests of our reader.
//
//	bolt grow FILE PAGESIZE SEED N   commits N random transactions
//	bolt spin FILE                   commits until its standard input ends; every state is recognizable
//	bolt dump FILE                   prints the root bucket as JSON, with keys and values in hexadecimal
//	bolt check FILE                  fails if bbolt finds the database inconsistent
package main

import (
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand"
	"os"
	"strconv"
	"time"

	"go.etcd.io/bbolt"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "bolt:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	switch {
	case len(args) == 5 && args[0] == "grow":
		var numbers [3]int
		for i := range numbers {
			var err error
			if numbers[i], err = strconv.Atoi(args[2+i]); err != nil {
				return err
			}
		}
		return grow(args[1], numbers[0], int64(numbers[1]), numbers[2])
	case len(args) == 2 && args[0] == "spin":
		return spin(args[1])
	case len(args) == 2 && args[0] == "dump":
		return read(args[1], func(tx *bbolt.Tx) error {
			return json.NewEncoder(os.Stdout).Encode(dump(tx.Cursor().Bucket()))
		})
	case len(args) == 2 && args[0] == "check":
		return read(args[1], func(tx *bbolt.Tx) error {
			var first error
			for err := range tx.Check() {
				if first == nil {
					first = err
				}
			}
			return first
		})
	}
	return errors.New("unknown arguments")
}

func read(path string, do func(*bbolt.Tx) error) error {
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{ReadOnly: true})
	if err != nil {
		return err
	}
	defer db.Close()
	return db.View(do)
}

// bucket is how a bucket is printed: each item is a key with its value, or with a bucket.
type bucket struct {
	Sequence uint64
	Items    [][2]any
}

func dump(b *bbolt.Bucket) *bucket {
	found := &bucket{Sequence: b.Sequence(), Items: [][2]any{}}
	cursor := b.Cursor()
	for key, value := cursor.First(); key != nil; key, value = cursor.Next() {
		item := [2]any{hex.EncodeToString(key)}
		if value == nil {
			item[1] = dump(b.Bucket(key))
		} else {
			item[1] = hex.EncodeToString(value)
		}
		found.Items = append(found.Items, item)
	}
	return found
}

// grow commits n transactions of random puts, deletions and new buckets.
func grow(path string, pageSize int, seed int64, n int) error {
	rng := rand.New(rand.NewSource(seed))
	kinds := []bbolt.FreelistType{bbolt.FreelistArrayType, bbolt.FreelistMapType}
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{
		PageSize: pageSize, NoSync: true, FreelistType: kinds[seed%2], NoFreelistSync: seed%3 == 0,
	})
	if err != nil {
		return err
	}
	for i := 0; i < n; i++ {
		err := db.Update(func(tx *bbolt.Tx) error {
			for j := rng.Intn(5) + 1; j > 0; j-- {
				if err := change(tx, rng, pageSize); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return db.Close()
}

func bytesOf(rng *rand.Rand, length int) []byte {
	made := make([]byte, length)
	rng.Read(made)
	return made
}

func change(tx *bbolt.Tx, rng *rand.Rand, pageSize int) error {
	b, err := tx.CreateBucketIfNotExists([]byte{'t', byte(rng.Intn(4))})
	if err != nil {
		return err
	}
	for depth := rng.Intn(4); depth > 0; depth-- {
		if b, err = b.CreateBucketIfNotExists([]byte{'b', byte(rng.Intn(6))}); err != nil {
			return err
		}
	}
	switch rng.Intn(8) {
	case 0:
		if err := b.DeleteBucket([]byte{'b', byte(rng.Intn(6))}); err != nil && err != bbolt.ErrBucketNotFound {
			return err
		}
	case 1, 2:
		cursor := b.Cursor()
		for key, value := cursor.Seek(bytesOf(rng, 1)); key != nil && rng.Intn(40) > 0; key, value = cursor.Next() {
			if value == nil {
				continue
			}
			if err := b.Delete(append([]byte{}, key...)); err != nil {
				return err
			}
			key, value = cursor.Seek(bytesOf(rng, 1))
			if key == nil {
				break
			}
		}
	case 3:
		if _, err := b.NextSequence(); err != nil {
			return err
		}
	default:
		for i := rng.Intn(60); i > 0; i-- {
			sizes := []int{0, 3, 20, 20, 100, 500}
			if rng.Intn(100) == 0 {
				sizes = []int{pageSize, 3 * pageSize}
			}
			keys := []int{2, 5, 5, 40, 300}
			key := append([]byte{'k'}, bytesOf(rng, keys[rng.Intn(len(keys))])...)
			if err := b.Put(key, bytesOf(rng, sizes[rng.Intn(len(sizes))])); err != nil {
				return err
			}
		}
	}
	return nil
}

const (
	farApart = 16
	filler   = 250
)

// spin commits transactions, each of which writes its number into many buckets that are on different pages, and
// exchanges some of what else is in them, so that pages are freed and used again all the time.
func spin(path string) error {
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{NoSync: true})
	if err != nil {
		return err
	}
	rng := rand.New(rand.NewSource(1))
	ended := make(chan struct{})
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		close(ended)
	}()
	burst := 0
	for first := true; ; first = false {
		err := db.Update(func(tx *bbolt.Tx) error {
			number := binary.BigEndian.AppendUint64(nil, uint64(tx.ID()))
			for i := 0; i < farApart; i++ {
				b, err := tx.CreateBucketIfNotExists([]byte{'b', byte(i)})
				if err != nil {
					return err
				}
				for j := 0; j < filler; j++ {
					if !first && rng.Intn(20) > 0 {
						continue
					}
					key := binary.BigEndian.AppendUint32([]byte{'f'}, uint32(j))
					if err := b.Put(key, bytesOf(rng, rng.Intn(800))); err != nil {
						return err
					}
				}
				if err := b.Put([]byte("number"), number); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
		if first {
			fmt.Println("ready")
		}
		// Without a pause, a reader would never come between two commits; with a pause after each, seldom among them.
		var pause time.Duration
		if burst--; burst < 0 {
			burst, pause = rng.Intn(20), time.Duration(rng.Intn(8000))*time.Microsecond
		}
		select {
		case <-ended:
			return db.Close()
		case <-time.After(pause):
		}
	}
}
