# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""What shells offer for an operand, beside words that are always the same.

What is in a datastore is asked of ``loopdev snapshots``, with the datastore that the line names,
and what is mapped of ``loopdev maps``. They have no terminal then: nobody is asked for a password.
"""

from __future__ import annotations

# The shells' own actions, for each kind of operand.
DEVICE = {
    "bash": "_loopdev_devices",
    "zsh": "{_files -g '*'; compadd -- /dev/loop[0-9]*(N)}",
    "fish": "(__fish_complete_path; _loopdev_devices)",
}
IMAGE = {"bash": "_loopdev_images", "zsh": "_loopdev_images", "fish": "(_loopdev_images)"}
GROUP = {"bash": "_loopdev_groups", "zsh": "_loopdev_groups", "fish": "(_loopdev_groups)"}
SOURCE = {
    "bash": "_loopdev_sources",
    "zsh": "{_files -g '*'; _loopdev_images}",
    "fish": "(__fish_complete_path; _loopdev_images)",
}
MAP = {"bash": "_loopdev_maps", "zsh": "_loopdev_maps", "fish": "(_loopdev_maps)"}
ACTIONS = {"device": DEVICE, "image": IMAGE, "group": GROUP, "source": SOURCE, "map": MAP}

# From the table: the first column has the images; a snapshot without any has "-" for its size.
_IMAGES = """awk 'NR > 1 && $2 != "-" { print $1 }'"""
_GROUPS = """awk 'NR > 1 { sub($2 == "-" ? "/[^/]*$" : "/[^/]*/[^/]*$", "", $1); print $1 }'"""
# Names, and devices: a map that has none has "-".
_MAPS = """awk 'NR > 1 { print $1; if ($2 != "-") print $2 }'"""

_BASH = f"""\
# The names of snapshots have colons in them; this way lists of them show all of each.
COMP_WORDBREAKS=${{COMP_WORDBREAKS//:}}
_loopdev_devices() {{
  compgen -f -- "$1"
  compgen -G "/dev/loop[0-9]*" -- "$1" | grep -- "^$1"
}}
# Bash takes words apart at each of COMP_WORDBREAKS, which servers have in them, and replaces what
# stands behind the last of these. So the words are put together again, but for --option=value, and
# of what is offered, what stands before the last piece is left out.
_loopdev() {{
  local rest=$COMP_LINE piece i at=0 current before
  local -a whole=()
  for ((i = 0; i < ${{#COMP_WORDS[@]}}; i++)); do
    piece=${{COMP_WORDS[i]}}
    if ((i == 0)) || [[ $rest == [[:space:]]* ]]; then
      rest=${{rest#"${{rest%%[![:space:]]*}}"}}
      whole+=("$piece")
    elif [[ $piece == "=" && ${{whole[-1]}} == --* ]]; then
      whole+=("")
    else
      whole[-1]+=$piece
    fi
    rest=${{rest#"$piece"}}
    ((i == COMP_CWORD)) && at=$((${{#whole[@]}} - 1))
  done
  # Somebody else calls us, with words that are not those of the line.
  ((at)) || {{ _shtab_loopdev "$@"; return; }}
  local -a COMP_WORDS=("${{whole[@]}}")
  local COMP_CWORD=$at
  _shtab_loopdev "$@"
  current=${{whole[at]}}
  before=
  for ((i = 0; i < ${{#current}}; i++)); do
    [[ $COMP_WORDBREAKS == *"${{current:i:1}}"* ]] && before=${{current:0:i + 1}}
  done
  COMPREPLY=("${{COMPREPLY[@]#"$before"}}")
}}
_loopdev_table() {{
  local i value options=()
  for ((i = 1; i < ${{#COMP_WORDS[@]}}; i++)); do
    case ${{COMP_WORDS[i]}} in
      --repository|--fingerprint|--ns)
        value=${{COMP_WORDS[i + 1]}}
        options+=("${{COMP_WORDS[i]}}" "${{value/#\\~/$HOME}}")
    esac
  done
  "${{COMP_WORDS[0]}}" snapshots "${{options[@]}}" </dev/null 2>/dev/null
}}
_loopdev_images() {{
  compgen -W "$(_loopdev_table | {_IMAGES})" -- "$1"
}}
_loopdev_groups() {{
  compgen -W "$(_loopdev_table | {_GROUPS} | uniq)" -- "$1"
}}
_loopdev_sources() {{
  compgen -f -- "$1"
  _loopdev_images "$1"
}}
_loopdev_maps() {{
  compgen -W "$("${{COMP_WORDS[0]}}" maps 2>/dev/null | {_MAPS})" -- "$1"
}}
"""
_ZSH = f"""\
_loopdev_table() {{
  local i
  local -a options
  for ((i = 2; i <= $#words; i++)); do
    case $words[i] in
      --repository|--fingerprint|--ns) options+=($words[i] ${{(Q)~words[i + 1]}}) ;;
      --repository=*|--fingerprint=*|--ns=*) options+=(${{(Q)words[i]}}) ;;
    esac
  done
  $service snapshots $options </dev/null 2>/dev/null
}}
_loopdev_images() {{
  local -a found
  found=(${{(f)"$(_loopdev_table | {_IMAGES})"}})
  compadd -a found
}}
_loopdev_groups() {{
  local -a found
  found=(${{(f)"$(_loopdev_table | {_GROUPS} | uniq)"}})
  compadd -a found
}}
_loopdev_maps() {{
  local -a found
  found=(${{(f)"$($service maps 2>/dev/null | {_MAPS})"}})
  compadd -a found
}}
"""
_FISH = f"""\
function _loopdev_devices
    printf '%s\\n' /dev/loop* | string match -r '.*loop[0-9]+$'
end
function _loopdev_table
    set -l words (commandline -opc)
    set -l options
    for i in (seq (count $words))
        switch $words[$i]
            case --repository --fingerprint --ns
                set -l value $words[(math $i + 1)]
                set -a options $words[$i] (string replace -r '^~(?=/|$)' $HOME -- $value)
            case '--repository=*' '--fingerprint=*' '--ns=*'
                set -a options $words[$i]
        end
    end
    command $words[1] snapshots $options </dev/null 2>/dev/null
end
function _loopdev_images
    _loopdev_table | {_IMAGES}
end
function _loopdev_groups
    _loopdev_table | {_GROUPS} | uniq
end
function _loopdev_maps
    set -l words (commandline -opc)
    command $words[1] maps 2>/dev/null | {_MAPS}
end
"""
PREAMBLE = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}
