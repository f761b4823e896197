"""`python -m ash_mcp.cli` is `ash`, also where no script is installed."""

from ash_mcp.cli import main

main()
