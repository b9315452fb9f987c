"""``onlap completion``: generated from the parsers, so that it knows what they know."""

from __future__ import annotations

from onlap.cli.call import Call
from onlap.cli.parser import Parser, make_parser
from onlap.cli.registry import VERBS, Verb

_KEYS = "onlap -q ls 2>/dev/null"


def arguments(parser: Parser) -> None:
    parser.explain(
        "Print a script that completes verbs, options, and the keys and names of snapshots.",
        'bash:  eval "$(onlap completion bash)"                          (in ~/.bashrc)',
        'zsh:   eval "$(onlap completion zsh)"                           (in ~/.zshrc, after compinit)',
        "fish:  onlap completion fish > ~/.config/fish/completions/onlap.fish",
    )
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), help="for which shell")


def run(call: Call) -> None:
    script = {"bash": _bash, "zsh": _zsh, "fish": _fish}[call.args.shell]
    call.out.line("\n".join(script()))


def _options(verb: Verb) -> list[str]:
    return [option for action in make_parser(verb)._actions for option in action.option_strings]


def _wants_key(verb: Verb) -> bool:
    return bool(make_parser(verb).keys)


def _bash() -> list[str]:
    lines = [
        "_onlap() {",
        "    local word=${COMP_WORDS[COMP_CWORD]} verb= i candidates keys=",
        "    for ((i = 1; i < COMP_CWORD; i++)); do",
        "        case ${COMP_WORDS[i]} in",
        "        --root) ((i++)) ;;",
        "        -*) ;;",
        "        *) verb=${COMP_WORDS[i]}; break ;;",
        "        esac",
        "    done",
        "    case $verb in",
        f"    '') candidates='{' '.join(VERBS)} --root --json --quiet --verbose --help --version' ;;",
    ]
    for verb in VERBS.values():
        keys = " keys=1" if _wants_key(verb) else ""
        lines.append(f"    {verb.name}) candidates='{' '.join(_options(verb))}'{keys} ;;")
    lines += [
        "    esac",
        "    if [[ $verb && $word != -* ]]; then",
        "        candidates=",
        f"        [[ $keys ]] && candidates=$({_KEYS})",
        "    fi",
        "    local IFS=$' \\t\\n'",
        '    COMPREPLY=($(compgen -W "$candidates" -- "$word"))',
        "}",
        "complete -o default -F _onlap onlap",
    ]
    return lines


def _zsh() -> list[str]:
    lines = [
        "_onlap() {",
        "    local verb i",
        "    for ((i = 2; i < CURRENT; i++)); do",
        "        case $words[i] in",
        "        --root) ((i++)) ;;",
        "        -*) ;;",
        "        *) verb=$words[i]; break ;;",
        "        esac",
        "    done",
        "    local -a verbs keys options",
        "    case $verb in",
        "    '')",
        "        verbs=(",
    ]
    lines += [f"            '{verb.name}:{_for_zsh(verb.summary)}'" for verb in VERBS.values()]
    lines += ["        )", "        _describe verb verbs", "        return ;;"]
    for verb in VERBS.values():
        keys = f' keys=(${{(f)"$({_KEYS})"}})' if _wants_key(verb) else ""
        lines.append(f"    {verb.name}) options=({' '.join(_options(verb))}){keys} ;;")
    lines += [
        "    esac",
        "    if [[ $PREFIX == -* ]]; then",
        "        compadd -a options",
        "    else",
        "        compadd -a keys",
        "        _files",
        "    fi",
        "}",
        "compdef _onlap onlap",
    ]
    return lines


def _for_zsh(text: str) -> str:
    return text.replace("'", "'\\''").replace(":", "\\:")


def _fish() -> list[str]:
    lines = []
    for verb in VERBS.values():
        summary = verb.summary.replace("'", "\\'")
        lines.append(f"complete -c onlap -n __fish_use_subcommand -a {verb.name} -d '{summary}'")
        seen = f"-n '__fish_seen_subcommand_from {verb.name}'"
        if _wants_key(verb):
            lines.append(f"complete -c onlap {seen} -a '({_KEYS})'")
        for action in make_parser(verb)._actions:
            flags = [f"-l {o[2:]}" if o.startswith("--") else f"-s {o[1:]}" for o in action.option_strings]
            if flags:
                value = "" if action.nargs == 0 else " -r"
                about = (action.help or "").replace("\\", "\\\\").replace("'", "\\'")
                lines.append(f"complete -c onlap {seen} {' '.join(flags)}{value} -d '{about}'")
    return lines
