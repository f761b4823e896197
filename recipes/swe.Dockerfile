# The image of the recipe `swe`: that of sandboxes, and what it takes to build and search source code.
# From the repository's root, after that one: scripts/images swe
ARG BASE=localhost/ash/recipes:dev

FROM ${BASE}
USER 0
RUN apt-get update \
  && apt-get install --yes --no-install-recommends \
    build-essential cmake file jq less openssh-client patch pkg-config ripgrep unzip xz-utils \
  && rm -rf /var/lib/apt/lists/*
USER 10001:10001
