"""One request to a sandbox, and its answer.

classifier          which request is a call to a sandbox
door                what passes through an endpoint that callers reach directly
direct              which request goes to a sandbox's own endpoint
sandbox_exchange    the base of the two below: one sandbox, one caller, one answer
exchange            one relayed call
ports               the doors to servers inside a sandbox
passage             one request to a sandbox's own endpoint
tunnel              one WebSocket to a sandbox
sandbox_response    the sandbox's answer on its way to the caller
stateless_results   what such an answer lacks where the sandbox's server is of the other era
"""
