# Completion of vmctl(8) for fish.  vmctl itself prints the candidates.

function __vmctl_complete
    set -l words (commandline -opc)
    set -l typed (commandline -ct)
    set -l vmctl $words[1]
    set -e words[1]
    set -l lines ($vmctl --complete $words "$typed" 2>/dev/null)
    if test "$lines[1]" = files
        set -l before '^(?:(?:raw|qcow2):|(?:network-config|password-hash|ssh-key|user-data|vendor-data)=)'
        set -l prefix (string match -r $before -- "$typed")
        for path in (__fish_complete_path (string replace -r $before '' -- "$typed"))
            echo -- "$prefix$path"
        end
        return
    end
    set -e lines[1]
    printf '%s\n' $lines
end

complete -c vmctl -f -a '(__vmctl_complete)'
