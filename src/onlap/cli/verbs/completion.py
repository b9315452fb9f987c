"""``onlap completion``: a short script per shell, which asks the command itself (:mod:`onlap.cli.complete`)."""

from __future__ import annotations

from onlap.cli.call import Call
from onlap.cli.complete import SHELLS
from onlap.cli.parser import Parser
from onlap.cli.registry import COMPLETE

# None of them evaluates a candidate: bash's "compgen -W" would.
_BASH = """\
_onlap() {
    local candidate
    COMPREPLY=()
    while IFS= read -r candidate; do
        COMPREPLY+=("$candidate")
    done < <(onlap COMPLETE bash "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null)
}
complete -o default -F _onlap onlap"""

_ZSH = """\
_onlap() {
    local line
    local -a names texts
    for line in "${(@f)$(onlap COMPLETE zsh "${(@Q)words[2,CURRENT-1]}" "${(Q)PREFIX}" 2>/dev/null)}"; do
        [[ -n $line ]] && names+=("${line%%$'\\t'*}") texts+=("${line/$'\\t'/  -- }")
    done
    if (( $#names )); then compadd -d texts -a names; else _files; fi
}
compdef _onlap onlap"""

_FISH = """\
function __onlap_complete
    set -l words (commandline -opc)
    set -l last (commandline -ct)
    set -l found (onlap COMPLETE fish $words[2..-1] "$last" 2>/dev/null)
    if set -q found[1]; printf '%s\\n' $found; else; __fish_complete_path "$last"; end
end
complete -c onlap -f -a '(__onlap_complete)'"""


def completion_arguments(parser: Parser) -> None:
    parser.explain(
        "Print a script that completes verbs, options, and the names of snapshots and images.",
        'bash:  eval "$(onlap completion bash)"                          (in ~/.bashrc)',
        'zsh:   eval "$(onlap completion zsh)"                           (in ~/.zshrc, after compinit)',
        "fish:  onlap completion fish > ~/.config/fish/completions/onlap.fish",
    )
    parser.add_argument("shell", choices=SHELLS, help="the shell")


def completion(call: Call) -> None:
    script = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}[call.args.shell]
    call.out.line(script.replace("COMPLETE", COMPLETE))
