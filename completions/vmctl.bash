# Completion of vmctl(8) for bash.  vmctl itself prints the candidates.

_vmctl() {
    local word line
    local -a words=() lines
    COMPREPLY=()
    # bash splits `raw:disk` and `a=b` into several words; join them again.
    for word in "${COMP_WORDS[@]:1:COMP_CWORD}"; do
        if [[ ${#words[@]} -gt 0 && ($word == [:=] || ${words[-1]} == *[:=]) ]]; then
            words[-1]+=$word
        else
            words+=("$word")
        fi
    done
    mapfile -t lines < <("${COMP_WORDS[0]}" --complete "${words[@]}" 2>/dev/null)
    if [[ ${lines[0]-} == files ]]; then
        word=${COMP_WORDS[COMP_CWORD]}
        compopt -o filenames
        mapfile -t COMPREPLY < <(compgen -f -- "${word#[:=]}")
        return
    fi
    for line in "${lines[@]:1}"; do
        printf -v word %q "${line%%$'\t'*}"
        COMPREPLY+=("$word")
    done
    [[ ${COMPREPLY[*]} != *=* ]] || compopt -o nospace  # a value follows
}

complete -F _vmctl vmctl
