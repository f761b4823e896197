"""The seed's REST: what clients of the system that Ash began from ask for. `docs/rest.md` is for its users.

shapes       bodies of requests and answers, as models
spawn_body   from the body of a spawn to what the hive is asked for
starts       spawns that go on after their request was answered
seed         the requests
openapi      their description, made from the models
"""
