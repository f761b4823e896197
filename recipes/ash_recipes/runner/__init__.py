"""The runner: what starts in every sandbox, serves one recipe at `/mcp` and a private surface at `/_ash/`.

A recipe that runs in the runner's own process reaches it by `ash_recipes.runner.context.current`.
"""
