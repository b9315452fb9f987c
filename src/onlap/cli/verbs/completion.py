"""``onlap completion``: generated from the parsers, so that it knows what they know."""

from __future__ import annotations

from onlap.cli.call import Call
from onlap.cli.parser import Parser, make_parser
from onlap.cli.registry import GROUPS, VERBS, Verb, of_group

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


def _first_words() -> list[str]:
    return list(dict.fromkeys(name.partition(" ")[0] for name in VERBS))


def _second_words(group: str) -> list[str]:
    return [verb.name.partition(" ")[2] for verb in of_group(group)]


def _bash() -> list[str]:
    lines = [
        "_onlap() {",
        "    local word=${COMP_WORDS[COMP_CWORD]} verb= i candidates keys=",
        "    for ((i = 1; i < COMP_CWORD; i++)); do",
        "        case ${COMP_WORDS[i]} in",
        "        --root) ((i++)) ;;",
        "        -*) ;;",
        "        *)",
        '            verb="${verb:+$verb }${COMP_WORDS[i]}"',
        f"            case $verb in {'|'.join(sorted(GROUPS))}) ;; *) break ;; esac ;;",
        "        esac",
        "    done",
        "    case $verb in",
        f"    '') candidates='{' '.join(_first_words())} --root --json --quiet --verbose --help --version' ;;",
    ]
    # Without a verb again: what follows is a word of the verb, and neither a key nor a file.
    lines += [f"    {group}) candidates='{' '.join(_second_words(group))}' verb= ;;" for group in sorted(GROUPS)]
    for verb in VERBS.values():
        keys = " keys=1" if _wants_key(verb) else ""
        lines.append(f"    '{verb.name}') candidates='{' '.join(_options(verb))}'{keys} ;;")
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
        '        *) verb="${verb:+$verb }$words[i]"',
        f"           case $verb in {'|'.join(sorted(GROUPS))}) ;; *) break ;; esac ;;",
        "        esac",
        "    done",
        "    local -a verbs keys options",
        "    case $verb in",
        "    '')",
        "        verbs=(",
    ]
    lines += [f"            '{verb.name}:{_for_zsh(verb.summary)}'" for verb in VERBS.values() if " " not in verb.name]
    lines += [f"            '{group}:{' '.join(_second_words(group))}'" for group in sorted(GROUPS)]
    lines += ["        )", "        _describe verb verbs", "        return ;;"]
    for group in sorted(GROUPS):
        lines += [f"    {group})", "        verbs=("]
        lines += [f"            '{verb.name.partition(' ')[2]}:{_for_zsh(verb.summary)}'" for verb in of_group(group)]
        lines += ["        )", "        _describe verb verbs", "        return ;;"]
    for verb in VERBS.values():
        keys = f' keys=(${{(f)"$({_KEYS})"}})' if _wants_key(verb) else ""
        lines.append(f"    '{verb.name}') options=({' '.join(_options(verb))}){keys} ;;")
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
    lines = [
        f"complete -c onlap -n __fish_use_subcommand -a {group} -d '{' '.join(_second_words(group))}'"
        for group in sorted(GROUPS)
    ]
    for verb in VERBS.values():
        summary = verb.summary.replace("'", "\\'")
        group, _, second = verb.name.rpartition(" ")
        lines.append(f"# onlap {verb.name}")
        if group:
            words = " ".join(_second_words(group))
            here = f"__fish_seen_subcommand_from {group}; and not __fish_seen_subcommand_from {words}"
            seen = f"-n '__fish_seen_subcommand_from {group}; and __fish_seen_subcommand_from {second}'"
        else:
            here = "__fish_use_subcommand"
            groups = " ".join(sorted(GROUPS))
            # Not after a group, whose verbs have some of the same names.
            seen = f"-n '__fish_seen_subcommand_from {second}; and not __fish_seen_subcommand_from {groups}'"
        lines.append(f"complete -c onlap -n '{here}' -a {second} -d '{summary}'")
        if _wants_key(verb):
            lines.append(f"complete -c onlap {seen} -a '({_KEYS})'")
        for action in make_parser(verb)._actions:
            flags = [f"-l {o[2:]}" if o.startswith("--") else f"-s {o[1:]}" for o in action.option_strings]
            if flags:
                value = "" if action.nargs == 0 else " -r"
                about = (action.help or "").replace("\\", "\\\\").replace("'", "\\'")
                lines.append(f"complete -c onlap {seen} {' '.join(flags)}{value} -d '{about}'")
    return lines
