#!/bin/bash
# Runs the benchmarks that print figures as JSON in their last line, one after another:
#
#     bash benchmarks/all.sh [--quick] [NAME...]
#
# Each adds its figures to benchmarks/results/NAME.json (with --quick NAME_quick.json), and those that
# are more than 10 % above the last ones are printed. The figures of all runs are plotted in
# benchmarks/results/index.html. Run it on a machine that does nothing else: an hour, with --quick
# half an hour. PYTHON names another interpreter.
set -o pipefail
cd "$(dirname "$0")" || exit
python=${PYTHON:-python}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
quick=
if [ "$1" = --quick ]; then quick=1; shift; fi
[ $# -gt 0 ] || set -- step generation tools scaling peers
failed=0
for name in "$@"; do
    options=()
    case $name in
        scaling | peers) [ -z "$quick" ] || options=(--quick) ;;
    esac
    echo "== $name ${options[*]}"
    if output=$("$python" "$name.py" "${options[@]}" | tee -a /dev/stderr); then # -a: a file that takes the errors is not cut
        "$python" record.py "$name${quick:+_quick}" <<<"$output" || failed=1
    else
        echo "== $name failed"
        failed=1
    fi
done
exit $failed
