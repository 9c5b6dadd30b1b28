# Print an optspec for argparse to handle cmd's options that are independent of any subcommand.
function __fish_knockq_global_optspecs
    string join \n h/help V/version
end

function __fish_knockq_needs_command
    # Figure out if the current invocation already has a command.
    set -l cmd (commandline -opc)
    set -e cmd[1]
    argparse -s (__fish_knockq_global_optspecs) -- $cmd 2>/dev/null
    or return
    if set -q argv[1]
        # Also print the command, so this can be used to figure out what it is.
        echo $argv[1]
        return 1
    end
    return 0
end

function __fish_knockq_using_subcommand
    set -l cmd (__fish_knockq_needs_command)
    test -z "$cmd"
    and return 1
    contains -- $cmd[1] $argv
end

complete -c knockq -n "__fish_knockq_needs_command" -s h -l help -d 'Print help'
complete -c knockq -n "__fish_knockq_needs_command" -s V -l version -d 'Print version'
complete -c knockq -n "__fish_knockq_needs_command" -f -a "init" -d 'Server: make key, configuration, counter store and nft include file'
complete -c knockq -n "__fish_knockq_needs_command" -f -a "check" -d 'Server: check configuration, keys and permissions'
complete -c knockq -n "__fish_knockq_needs_command" -f -a "doctor" -d 'Server: find out why a knock does not work'
complete -c knockq -n "__fish_knockq_needs_command" -f -a "ruleset" -d 'Server: print the nft include file for this configuration'
complete -c knockq -n "__fish_knockq_needs_command" -f -a "serve" -d 'Server: run the daemon, in the foreground'
complete -c knockq -n "__fish_knockq_needs_command" -f -a "confirm" -d 'Server: take the gate of `serve --try` for good'
complete -c knockq -n "__fish_knockq_needs_command" -f -a "grants" -d 'Server: which doors are open, for whom and how long'
complete -c knockq -n "__fish_knockq_needs_command" -f -a "revoke" -d 'Server: shut open doors'
complete -c knockq -n "__fish_knockq_needs_command" -f -a "status" -d 'Server: how the daemon is: what came, what became of it, who knocked last'
complete -c knockq -n "__fish_knockq_needs_command" -f -a "watch" -d 'Server: what happens: grants, closings, refusals, reloads, faults'
complete -c knockq -n "__fish_knockq_needs_command" -f -a "explain" -d 'Server: what the SYNs were that were refused last, and what is wrong with them'
complete -c knockq -n "__fish_knockq_needs_command" -f -a "user" -d 'Server: who may knock'
complete -c knockq -n "__fish_knockq_needs_command" -f -a "import" -d 'Server: take over the profiles of knockknock; on a client, that of one host'
complete -c knockq -n "__fish_knockq_needs_command" -f -a "recover" -d 'Server: make a new counter store, after a restored backup or a lost one'
complete -c knockq -n "__fish_knockq_needs_command" -f -a "keygen" -d 'Client: make this machine\'s key and print its public half'
complete -c knockq -n "__fish_knockq_needs_command" -f -a "host" -d 'Client: the hosts that one knocks at'
complete -c knockq -n "__fish_knockq_needs_command" -f -a "send" -d 'Client: knock'
complete -c knockq -n "__fish_knockq_needs_command" -f -a "connect" -d 'Client: knock, connect, and pass standard input and output: a ProxyCommand for ssh'
complete -c knockq -n "__fish_knockq_needs_command" -f -a "proxy" -d 'Client: a SOCKS 5 proxy that knocks at the hosts that one has a profile of'
complete -c knockq -n "__fish_knockq_using_subcommand init" -l protect -d 'A port to shut to all but those who knock' -r
complete -c knockq -n "__fish_knockq_using_subcommand init" -l knock-ports -d 'Ports to knock at, such as 20000-21023 [default: 1024 where nobody listens]' -r
complete -c knockq -n "__fish_knockq_using_subcommand init" -l address -d 'Name or address that clients reach this host by [default: its own addresses]' -r
complete -c knockq -n "__fish_knockq_using_subcommand init" -l dir -d 'Where to put the configuration' -r -F
complete -c knockq -n "__fish_knockq_using_subcommand init" -l state -d 'Where to keep the counters' -r -F
complete -c knockq -n "__fish_knockq_using_subcommand init" -l runtime -d 'Where the daemon listens for `revoke` and its like' -r -F
complete -c knockq -n "__fish_knockq_using_subcommand init" -s h -l help -d 'Print help'
complete -c knockq -n "__fish_knockq_using_subcommand check" -l config -d 'The server\'s configuration' -r -F
complete -c knockq -n "__fish_knockq_using_subcommand check" -s h -l help -d 'Print help'
complete -c knockq -n "__fish_knockq_using_subcommand doctor" -l config -d 'The server\'s configuration' -r -F
complete -c knockq -n "__fish_knockq_using_subcommand doctor" -l json -d 'As a JSON array'
complete -c knockq -n "__fish_knockq_using_subcommand doctor" -s h -l help -d 'Print help'
complete -c knockq -n "__fish_knockq_using_subcommand ruleset" -l config -d 'The server\'s configuration' -r -F
complete -c knockq -n "__fish_knockq_using_subcommand ruleset" -l output -d 'Put it into this file, at once and whole, instead of printing it' -r -F
complete -c knockq -n "__fish_knockq_using_subcommand ruleset" -l check -d 'Let nft and the kernel check it too, without applying it'
complete -c knockq -n "__fish_knockq_using_subcommand ruleset" -l load -d 'Load knockq.nft, the ruleset that `serve` loaded last: the gate then stands, whatever the configuration is like now'
complete -c knockq -n "__fish_knockq_using_subcommand ruleset" -s h -l help -d 'Print help'
complete -c knockq -n "__fish_knockq_using_subcommand serve" -l config -d 'The server\'s configuration' -r -F
complete -c knockq -n "__fish_knockq_using_subcommand serve" -l try -d 'Take the gate away after this time, unless `knockq confirm` was run' -r
complete -c knockq -n "__fish_knockq_using_subcommand serve" -l debug -d 'Log every packet (never a token)'
complete -c knockq -n "__fish_knockq_using_subcommand serve" -s h -l help -d 'Print help'
complete -c knockq -n "__fish_knockq_using_subcommand confirm" -l config -d 'The server\'s configuration' -r -F
complete -c knockq -n "__fish_knockq_using_subcommand confirm" -s h -l help -d 'Print help'
complete -c knockq -n "__fish_knockq_using_subcommand grants" -l json -d 'As a JSON array'
complete -c knockq -n "__fish_knockq_using_subcommand grants" -s h -l help -d 'Print help'
complete -c knockq -n "__fish_knockq_using_subcommand revoke" -l user -d 'The user whose doors are shut; what others hold open stays open' -r
complete -c knockq -n "__fish_knockq_using_subcommand revoke" -l config -d 'The server\'s configuration' -r -F
complete -c knockq -n "__fish_knockq_using_subcommand revoke" -l all -d 'Shut every door'
complete -c knockq -n "__fish_knockq_using_subcommand revoke" -l kill -d 'End their established connections too'
complete -c knockq -n "__fish_knockq_using_subcommand revoke" -s h -l help -d 'Print help'
complete -c knockq -n "__fish_knockq_using_subcommand status" -l config -d 'The server\'s configuration' -r -F
complete -c knockq -n "__fish_knockq_using_subcommand status" -l runtime -d 'The directory of the daemon\'s sockets, for who may not read the configuration (default: /run/knockq)' -r -F
complete -c knockq -n "__fish_knockq_using_subcommand status" -l json -d 'As a JSON object'
complete -c knockq -n "__fish_knockq_using_subcommand status" -l prometheus -d 'As metrics, for the textfile collector of Prometheus\' node_exporter'
complete -c knockq -n "__fish_knockq_using_subcommand status" -s h -l help -d 'Print help'
complete -c knockq -n "__fish_knockq_using_subcommand watch" -l config -d 'The server\'s configuration' -r -F
complete -c knockq -n "__fish_knockq_using_subcommand watch" -l runtime -d 'The directory of the daemon\'s sockets, for who may not read the configuration (default: /run/knockq)' -r -F
complete -c knockq -n "__fish_knockq_using_subcommand watch" -l json -d 'As JSON, an object a line'
complete -c knockq -n "__fish_knockq_using_subcommand watch" -s h -l help -d 'Print help'
complete -c knockq -n "__fish_knockq_using_subcommand explain" -l config -d 'The server\'s configuration' -r -F
complete -c knockq -n "__fish_knockq_using_subcommand explain" -l json -d 'As a JSON array'
complete -c knockq -n "__fish_knockq_using_subcommand explain" -s h -l help -d 'Print help'
complete -c knockq -n "__fish_knockq_using_subcommand user; and not __fish_seen_subcommand_from add invite list show remove rename counter" -s h -l help -d 'Print help'
complete -c knockq -n "__fish_knockq_using_subcommand user; and not __fish_seen_subcommand_from add invite list show remove rename counter" -f -a "add" -d 'Let a client\'s key open services, and print the profile that its user imports'
complete -c knockq -n "__fish_knockq_using_subcommand user; and not __fish_seen_subcommand_from add invite list show remove rename counter" -f -a "invite" -d 'Let a user open services with a key that is made here, and print the profile that holds it, once'
complete -c knockq -n "__fish_knockq_using_subcommand user; and not __fish_seen_subcommand_from add invite list show remove rename counter" -f -a "list" -d 'List who may knock'
complete -c knockq -n "__fish_knockq_using_subcommand user; and not __fish_seen_subcommand_from add invite list show remove rename counter" -f -a "show" -d 'Show one user, or print their profile again'
complete -c knockq -n "__fish_knockq_using_subcommand user; and not __fish_seen_subcommand_from add invite list show remove rename counter" -f -a "remove" -d 'Take a user away'
complete -c knockq -n "__fish_knockq_using_subcommand user; and not __fish_seen_subcommand_from add invite list show remove rename counter" -f -a "rename" -d 'Give a user another name'
complete -c knockq -n "__fish_knockq_using_subcommand user; and not __fish_seen_subcommand_from add invite list show remove rename counter" -f -a "counter" -d 'Set the count of a user\'s knockknock profile'
complete -c knockq -n "__fish_knockq_using_subcommand user; and __fish_seen_subcommand_from add" -l key -d 'The public key that `knockq keygen` printed on the user\'s machine' -r
complete -c knockq -n "__fish_knockq_using_subcommand user; and __fish_seen_subcommand_from add" -l psk-file -d 'A file with a pre-shared key, which the user needs too; it stays where it is (mode 0600)' -r -F
complete -c knockq -n "__fish_knockq_using_subcommand user; and __fish_seen_subcommand_from add" -l allow -d 'A service that the user may open; may be left out if there is one' -r
complete -c knockq -n "__fish_knockq_using_subcommand user; and __fish_seen_subcommand_from add" -l from -d 'Networks that the user\'s knocks may come from' -r
complete -c knockq -n "__fish_knockq_using_subcommand user; and __fish_seen_subcommand_from add" -l source -d 'Take only knocks that are bound to the address they come from' -r -f -a "any\t'Bound to the sender\'s address, or unbound'
bound\t'Bound to the sender\'s address'"
complete -c knockq -n "__fish_knockq_using_subcommand user; and __fish_seen_subcommand_from add" -l open-for -d 'A knock opens for so long at most, if the service allows more: 90s, 15m, 2h, 1d' -r
complete -c knockq -n "__fish_knockq_using_subcommand user; and __fish_seen_subcommand_from add" -l expires -d 'From then on the user opens nothing: 2027-01-31, or 2027-01-31T18:00:00Z' -r
complete -c knockq -n "__fish_knockq_using_subcommand user; and __fish_seen_subcommand_from add" -l add-to -d 'A set of yours that the user\'s address is added to while a door is open: \'inet filter alice\'' -r
complete -c knockq -n "__fish_knockq_using_subcommand user; and __fish_seen_subcommand_from add" -l config -d 'The server\'s configuration' -r -F
complete -c knockq -n "__fish_knockq_using_subcommand user; and __fish_seen_subcommand_from add" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c knockq -n "__fish_knockq_using_subcommand user; and __fish_seen_subcommand_from invite" -l allow -d 'A service that the user may open; may be left out if there is one' -r
complete -c knockq -n "__fish_knockq_using_subcommand user; and __fish_seen_subcommand_from invite" -l from -d 'Networks that the user\'s knocks may come from' -r
complete -c knockq -n "__fish_knockq_using_subcommand user; and __fish_seen_subcommand_from invite" -l source -d 'Take only knocks that are bound to the address they come from' -r -f -a "any\t'Bound to the sender\'s address, or unbound'
bound\t'Bound to the sender\'s address'"
complete -c knockq -n "__fish_knockq_using_subcommand user; and __fish_seen_subcommand_from invite" -l open-for -d 'A knock opens for so long at most, if the service allows more: 90s, 15m, 2h, 1d' -r
complete -c knockq -n "__fish_knockq_using_subcommand user; and __fish_seen_subcommand_from invite" -l expires -d 'From then on the user opens nothing: 2027-01-31, or 2027-01-31T18:00:00Z' -r
complete -c knockq -n "__fish_knockq_using_subcommand user; and __fish_seen_subcommand_from invite" -l add-to -d 'A set of yours that the user\'s address is added to while a door is open: \'inet filter alice\'' -r
complete -c knockq -n "__fish_knockq_using_subcommand user; and __fish_seen_subcommand_from invite" -l config -d 'The server\'s configuration' -r -F
complete -c knockq -n "__fish_knockq_using_subcommand user; and __fish_seen_subcommand_from invite" -l qr -d 'Show the profile as a QR code, for a terminal that is large enough'
complete -c knockq -n "__fish_knockq_using_subcommand user; and __fish_seen_subcommand_from invite" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c knockq -n "__fish_knockq_using_subcommand user; and __fish_seen_subcommand_from list" -l config -d 'The server\'s configuration' -r -F
complete -c knockq -n "__fish_knockq_using_subcommand user; and __fish_seen_subcommand_from list" -l json -d 'Print it for programs'
complete -c knockq -n "__fish_knockq_using_subcommand user; and __fish_seen_subcommand_from list" -s h -l help -d 'Print help'
complete -c knockq -n "__fish_knockq_using_subcommand user; and __fish_seen_subcommand_from show" -l config -d 'The server\'s configuration' -r -F
complete -c knockq -n "__fish_knockq_using_subcommand user; and __fish_seen_subcommand_from show" -l profile -d 'Print the profile that the user imports, as `knockq user add` did; it holds no private key'
complete -c knockq -n "__fish_knockq_using_subcommand user; and __fish_seen_subcommand_from show" -l json -d 'Print it for programs'
complete -c knockq -n "__fish_knockq_using_subcommand user; and __fish_seen_subcommand_from show" -s h -l help -d 'Print help'
complete -c knockq -n "__fish_knockq_using_subcommand user; and __fish_seen_subcommand_from remove" -l config -d 'The server\'s configuration' -r -F
complete -c knockq -n "__fish_knockq_using_subcommand user; and __fish_seen_subcommand_from remove" -s h -l help -d 'Print help'
complete -c knockq -n "__fish_knockq_using_subcommand user; and __fish_seen_subcommand_from rename" -l config -d 'The server\'s configuration' -r -F
complete -c knockq -n "__fish_knockq_using_subcommand user; and __fish_seen_subcommand_from rename" -s h -l help -d 'Print help'
complete -c knockq -n "__fish_knockq_using_subcommand user; and __fish_seen_subcommand_from counter" -l config -d 'The server\'s configuration' -r -F
complete -c knockq -n "__fish_knockq_using_subcommand user; and __fish_seen_subcommand_from counter" -s h -l help -d 'Print help'
complete -c knockq -n "__fish_knockq_using_subcommand import; and not __fish_seen_subcommand_from knockknock" -s h -l help -d 'Print help'
complete -c knockq -n "__fish_knockq_using_subcommand import; and not __fish_seen_subcommand_from knockknock" -f -a "knockknock" -d 'Take over a server\'s profiles of knockknock as users, or a client\'s profile of one host'
complete -c knockq -n "__fish_knockq_using_subcommand import; and __fish_seen_subcommand_from knockknock" -l allow -d 'Server: a service that the users may open, may be left out if there is one. Client: NAME=PORT, of TCP [default: ssh=22]' -r
complete -c knockq -n "__fish_knockq_using_subcommand import; and __fish_seen_subcommand_from knockknock" -l name -d 'Client: what to call the host [default: the directory\'s name]' -r
complete -c knockq -n "__fish_knockq_using_subcommand import; and __fish_seen_subcommand_from knockknock" -l address -d 'Client: name or address of the server [default: the directory\'s name]' -r
complete -c knockq -n "__fish_knockq_using_subcommand import; and __fish_seen_subcommand_from knockknock" -l config -d 'The server\'s configuration' -r -F
complete -c knockq -n "__fish_knockq_using_subcommand import; and __fish_seen_subcommand_from knockknock" -s h -l help -d 'Print help'
complete -c knockq -n "__fish_knockq_using_subcommand recover" -l ahead -d 'How far this machine\'s clock was ahead of the right time before the loss, if it was' -r
complete -c knockq -n "__fish_knockq_using_subcommand recover" -l config -d 'The server\'s configuration' -r -F
complete -c knockq -n "__fish_knockq_using_subcommand recover" -s h -l help -d 'Print help'
complete -c knockq -n "__fish_knockq_using_subcommand keygen" -l show -d 'Print the public half of the key that is there'
complete -c knockq -n "__fish_knockq_using_subcommand keygen" -s h -l help -d 'Print help'
complete -c knockq -n "__fish_knockq_using_subcommand host; and not __fish_seen_subcommand_from add list show remove" -s h -l help -d 'Print help'
complete -c knockq -n "__fish_knockq_using_subcommand host; and not __fish_seen_subcommand_from add list show remove" -f -a "add" -d 'Add the profile that the administrator\'s `knockq user add` or `user invite` printed'
complete -c knockq -n "__fish_knockq_using_subcommand host; and not __fish_seen_subcommand_from add list show remove" -f -a "list" -d 'List the hosts that one knocks at'
complete -c knockq -n "__fish_knockq_using_subcommand host; and not __fish_seen_subcommand_from add list show remove" -f -a "show" -d 'Print a host\'s profile, with its server\'s public key and that key\'s fingerprint'
complete -c knockq -n "__fish_knockq_using_subcommand host; and not __fish_seen_subcommand_from add list show remove" -f -a "remove" -d 'Take a host\'s profile away'
complete -c knockq -n "__fish_knockq_using_subcommand host; and __fish_seen_subcommand_from add" -l same-server -d 'The server is one that another profile has under another address'
complete -c knockq -n "__fish_knockq_using_subcommand host; and __fish_seen_subcommand_from add" -s h -l help -d 'Print help'
complete -c knockq -n "__fish_knockq_using_subcommand host; and __fish_seen_subcommand_from list" -l json -d 'Print it for programs'
complete -c knockq -n "__fish_knockq_using_subcommand host; and __fish_seen_subcommand_from list" -s h -l help -d 'Print help'
complete -c knockq -n "__fish_knockq_using_subcommand host; and __fish_seen_subcommand_from show" -l json -d 'Print it for programs'
complete -c knockq -n "__fish_knockq_using_subcommand host; and __fish_seen_subcommand_from show" -s h -l help -d 'Print help'
complete -c knockq -n "__fish_knockq_using_subcommand host; and __fish_seen_subcommand_from remove" -s h -l help -d 'Print help'
complete -c knockq -n "__fish_knockq_using_subcommand send" -l source -d 'The address that the server sees, to which the knock is bound; `none` binds it to none' -r
complete -c knockq -n "__fish_knockq_using_subcommand send" -l print -d 'Print the packet instead of sending it; its counter is used up' -r -f -a "hex\t'From the IP header on, in hexadecimal'"
complete -c knockq -n "__fish_knockq_using_subcommand send" -s 4 -d 'Knock over IPv4'
complete -c knockq -n "__fish_knockq_using_subcommand send" -s 6 -d 'Knock over IPv6'
complete -c knockq -n "__fish_knockq_using_subcommand send" -l strict -d 'Refuse to knock where this host\'s timestamps would let an observer tell a knock from a connection'
complete -c knockq -n "__fish_knockq_using_subcommand send" -l wait -d 'Confirm by connecting to the service, for up to 10 s, and say what to check if it stays shut'
complete -c knockq -n "__fish_knockq_using_subcommand send" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c knockq -n "__fish_knockq_using_subcommand connect" -l source -d 'The address that the server sees, to which the knock is bound; `none` binds it to none' -r
complete -c knockq -n "__fish_knockq_using_subcommand connect" -l timeout -d 'Time within which the connection must stand' -r
complete -c knockq -n "__fish_knockq_using_subcommand connect" -s 4 -d 'Knock over IPv4'
complete -c knockq -n "__fish_knockq_using_subcommand connect" -s 6 -d 'Knock over IPv6'
complete -c knockq -n "__fish_knockq_using_subcommand connect" -l strict -d 'Refuse to knock where this host\'s timestamps would let an observer tell a knock from a connection'
complete -c knockq -n "__fish_knockq_using_subcommand connect" -s h -l help -d 'Print help'
complete -c knockq -n "__fish_knockq_using_subcommand proxy" -l listen -d 'Where to listen: an address of loopback; may be given several times' -r
complete -c knockq -n "__fish_knockq_using_subcommand proxy" -l auth -d 'Let in only who has the user and password in this file: one line, user:password, that you alone may read' -r -F
complete -c knockq -n "__fish_knockq_using_subcommand proxy" -l source -d 'The address that the server sees, to which the knock is bound; `none` binds it to none' -r
complete -c knockq -n "__fish_knockq_using_subcommand proxy" -s 4 -d 'Knock over IPv4'
complete -c knockq -n "__fish_knockq_using_subcommand proxy" -s 6 -d 'Knock over IPv6'
complete -c knockq -n "__fish_knockq_using_subcommand proxy" -l strict -d 'Refuse to knock where this host\'s timestamps would let an observer tell a knock from a connection'
complete -c knockq -n "__fish_knockq_using_subcommand proxy" -s h -l help -d 'Print help'
