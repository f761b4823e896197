# Sourced by .ci/run: suites, each bounded, and the account of them.
# shellcheck shell=bash

whole_bound=5250 # seconds, of the 5400 that a run may take
results=() passed=0 failed=0 skipped=0
here=$(dirname "${BASH_SOURCE[0]}")
rm -f .pytest_cache/v/cache/lastfailed # of an earlier run; .ci/again reads it
ASH_CI_PASSED_AGAIN=$(mktemp) # .ci/again writes to it, also as another user in another clone
export ASH_CI_PASSED_AGAIN
chmod 666 "$ASH_CI_PASSED_AGAIN"

record() { # NAME OUTCOME SECONDS
  results+=("$(printf '%-24s %-18s %5d s' "$@")")
}

skip() { # NAME WHY
  skipped=$((skipped + 1))
  record "$1" "$2" 0
}

minutes_left() { # MOST: of the run, less what the last suite needs to come to its end
  local left=$(((whole_bound - SECONDS) / 60 - 3))
  echo $((left < $1 ? (left > 0 ? left : 0) : $1))
}

suite() { # NAME BOUND COMMAND...: the bound in seconds; processes that outlive it are ended
  local name=$1 bound=$2 started=$SECONDS status
  shift 2
  [ "$bound" -le $((whole_bound - SECONDS)) ] || bound=$((whole_bound - SECONDS))
  if [ "$bound" -le 0 ]; then failed=$((failed + 1)); record "$name" "FAILED: no time" 0; return; fi
  printf '\n=== %s\n' "$name"
  timeout --kill-after=30 "$bound" "$@" </dev/null
  status=$?
  case $status in
    0) passed=$((passed + 1)); record "$name" passed $((SECONDS - started)) ;;
    124 | 137) failed=$((failed + 1)); record "$name" "FAILED: time out" $((SECONDS - started)) ;;
    *) failed=$((failed + 1)); record "$name" "FAILED: exit $status" $((SECONDS - started)) ;;
  esac
}

# A suite whose marker was lost collects nothing, and pytest ends with 5. One whose tests are all skipped would end
# with 0, which `tests/reporting.py` makes a failure.
marked() { # NAME BOUND MARKERS [PREPARATION]: the tests of a marker, after a script that installs what they need
  # `workers` files of them at once
  local name=$1 bound=$2 markers=$3 prepare=${4:-true}
  # shellcheck disable=SC2016 # the inner shell expands
  suite "$name" "$bound" bash -c '
    "$1" || exit
    "${PYTEST:-.venv/bin/pytest}" -ra --durations=12 -n "$4" --dist loadfile --no-loadscope-reorder -m "$2" && exit
    status=$?
    [ $status = 1 ] && exec "$3/again"
    exit $status' "$name" "$prepare" "$markers" "$here" "${workers:-0}"
}

summary() { # prints the account; 1 when a suite failed
  printf '\n=== summary, after %d s\n' $SECONDS
  printf '%s\n' "${results[@]}"
  sed 's/^/passed only when run again: /' "$ASH_CI_PASSED_AGAIN"
  rm -f "$ASH_CI_PASSED_AGAIN"
  printf '\nsuites: %d passed, %d failed, %d skipped\n' $passed $failed $skipped
  [ $failed = 0 ]
}
