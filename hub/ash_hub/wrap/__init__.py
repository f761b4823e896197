"""`ash wrap`: a server that speaks MCP on its stdin and stdout, behind walls of its own, for any MCP host.

No hive runs for it and nothing is re-read on the way: bytes go from the host to the server and back.

request.py       a request: the words of the server, folders, environment, network
program.py       files of the host that a program needs
packages.py      `npx …` and `uvx …`: a package installed once, behind walls, and shown read-only from then on
registries.py    package registries of this host, as a network policy
host_view.py     the host's facts, kept between starts
walls.py         from all that to the plan of a launch; pure
supervisor.py    starts a plan, carries its bytes, and sees it to its end
wrapped.py       one wrapped server, from a request to its exit code
servers_file.py  a host's file of MCP servers, and the one that replaces it
server_json.py   a server as MCP's registry describes it: its command line, a recipe of it
"""
