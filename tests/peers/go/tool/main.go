// Command tool is all the userland that the containers of the tests have: a static program in place of a shell.
//
//	tool write PATH TEXT   make or truncate a file
//	tool cat PATH          print one
//	tool mkdir PATH        make a directory
//	tool rm PATH           remove a file or tree
//	tool mv FROM TO        rename
//	tool wait              print "ready" and sleep until SIGTERM
//
// Several commands are parted by "--".
package main

import (
	"fmt"
	"os"
	"os/signal"
	"syscall"
)

func main() {
	for rest := os.Args[1:]; len(rest) > 0; {
		end := 0
		for end < len(rest) && rest[end] != "--" {
			end++
		}
		if err := run(rest[:end]); err != nil {
			fmt.Fprintln(os.Stderr, "tool:", err)
			os.Exit(1)
		}
		rest = rest[min(end+1, len(rest)):]
	}
}

func run(words []string) error {
	verb := fmt.Sprintf("%s/%d", words[0], len(words)-1)
	switch verb {
	case "write/2":
		return os.WriteFile(words[1], []byte(words[2]), 0o644)
	case "cat/1":
		content, err := os.ReadFile(words[1])
		if err == nil {
			_, err = os.Stdout.Write(content)
		}
		return err
	case "mkdir/1":
		return os.Mkdir(words[1], 0o755)
	case "rm/1":
		if _, err := os.Lstat(words[1]); err != nil { // RemoveAll would not say so
			return err
		}
		return os.RemoveAll(words[1])
	case "mv/2":
		return os.Rename(words[1], words[2])
	case "wait/0":
		stop := make(chan os.Signal, 1)
		signal.Notify(stop, syscall.SIGTERM)
		fmt.Println("ready")
		<-stop
		return nil
	}
	return fmt.Errorf("no such command: %s", verb)
}
