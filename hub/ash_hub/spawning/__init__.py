"""The parts of one spawn.

spawn_request     what a caller may ask for
spawn_policy      what this hive allows of it
recipes           what a sandbox is made from
specs             what a backend makes
refusal_pace      how fast refusals are answered to an owner who does not stop asking
start_turns       whose start is next, in rotation among owners
starting          create, wait until it answers, pin its tools
instance_watch    news of instances, shared by all that wait
pool              sandboxes started ahead
sandbox_requests  the hub's requests to a sandbox, within bounds
runner_client     those to a runner
server_client     those to an image that is a server by itself
schema_references what tools take, without references
toolsets          a sandbox's tools, cleaned and pinned
toolset_shelf     pinned tools: kept by the backend, cached in the store
"""
