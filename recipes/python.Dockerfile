# The image of the recipe `python`: that of sandboxes, and what people expect to import.
# From the repository's root, after that one: scripts/images python
ARG BASE=localhost/ash/recipes:dev

FROM ${BASE}
USER 0
# For `python3`, which is the base's and not the runner's.
RUN python3 -m pip install --no-cache-dir --break-system-packages \
    matplotlib numpy openpyxl pandas pillow requests scikit-learn scipy sympy
USER 10001:10001
