# The two commands of a newcomer are `make run` and `make test`; CI calls .ci/run.
# Nothing of the caller's Python reaches the project's own environment. Without compiled files each process of a test
# compiles all that it imports.
unexport PYTHONHOME PYTHONPATH PYTHONDONTWRITEBYTECODE VIRTUAL_ENV

QUICK := not heavy and not node and not clients and not replicas and not browser and not hosts and not extended and not kubernetes
# the tests wait more than they work: more of them at once than a small machine has processors
WORKERS ?= 4

.PHONY: help run test test-kubernetes check lock images bundle all-local

help:
	@echo "make run      install what is missing, start the hive, show it at work"
	@echo "make test     install what is missing, run the quick tests"
	@echo "make test-kubernetes   run the tests on the cluster that ASH_TEST_KUBECONFIG names"
	@echo "make check    lint, format, types, imports"
	@echo "make lock     pin the newest dependencies in constraints.txt"
	@echo "make images   build the container images, with docker, buildah or podman"
	@echo "make bundle   build the runner with its own Python into build/bundle, for any Linux image"
	@echo "make all-local   a hive on this machine's minikube or kind: images, chart, key"

run:
	@scripts/setup run
	@exec .venv/bin/ash up --demo

test:
	@scripts/setup test
	@exec .venv/bin/pytest -m "$(QUICK)" -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-kubernetes:
	@test -n "$$ASH_TEST_KUBECONFIG" || { echo "Name the kubeconfig of a cluster for tests in ASH_TEST_KUBECONFIG." \
	  "Its nodes need the images localhost/ash/hub:dev and localhost/ash/recipes:dev (make images) and any Redis as" \
	  "localhost/ash/redis:dev; this machine needs kubectl, helm and a way to the addresses of pods and Services." >&2; exit 1; }
	@scripts/setup test
	@exec .venv/bin/pytest -ra -m kubernetes

check:
	@scripts/check

lock:
	@scripts/lock

images:
	@scripts/images

bundle:
	@scripts/setup run
	@rm -rf build/bundle
	@.venv/bin/python -m ash_recipes.bundle build/bundle

all-local:
	@scripts/all-local
