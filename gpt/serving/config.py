"""The settings of the server."""
from dataclasses import dataclass

from ..errors import UserError
from ..interop.adapters import adapter_folders
from ..model.storage import check_storage


@dataclass
class ServeConfig:
    """What to serve, to whom, and how much of it. Raises UserError for impossible values."""

    init_from: str = "out"
    """Folder of a run (its last/ folder for the latest instead of the best weights), Hugging Face folder or name on its
    hub, or .gguf file."""
    host: str = "127.0.0.1"
    """Address to listen on: 127.0.0.1 is this machine alone, 0.0.0.0 everybody who can reach it."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""
    name: str = ""
    """What clients call the model; by default the name of its file or folder."""
    adapters: str = ""
    """LoRA adapters to offer beside the model, as in "pirate=adapters/pirate,legal=out-legal": PEFT folders, or runs
    that trained an adapter. Clients ask for the model MODEL:pirate."""
    run_dir: str = ""
    """Run folder that the page shows live; by default init_from, where that is a run."""
    rows: int = 8
    """Texts that are written at the same time; each has its own memory for keys and values."""
    queue: int = 64
    """Texts that may wait for a row. Who comes when the queue is full is sent away (429)."""
    context: int = 0
    """Tokens that a prompt may have, and where this is below the model's block_size, prompt and answer together; 0 =
    block_size."""
    max_new_tokens: int = 4096
    """Tokens per text that a client may ask for."""
    max_choices: int = 16
    """Texts that one request may ask for, and never more than rows + queue."""
    prefill_tokens: int = 256
    """Prompt tokens that are read between two steps of the texts being written: more is faster, less is smoother."""
    max_request_bytes: int = 1048576
    """Size of a request's body."""
    timeout: float = 300.0
    """Seconds that a request may take, waiting included."""
    shutdown_timeout: float = 30.0
    """Seconds that running requests get to finish when the server is asked to stop."""
    api_key: str = ""
    """Key that clients must send (Authorization: Bearer KEY); none if empty. Taken from the environment variable
    GPT_API_KEY where that is set, so that it need not stand on the command line."""
    cors_origins: str = ""
    """Origins whose pages may call the server, with commas between, or "*"; none if empty."""
    allowed_hosts: str = ""
    """Host names by which the server may be addressed, with commas between, or "*". By default those of this machine
    where `host` is this machine alone (a page elsewhere cannot then pose as one of ours), else any."""
    device: str = "cpu"
    """"cpu", "cuda" or "cuda:N"."""
    dtype: str = "float32"
    """How weights lie in memory on a CPU: float32, bfloat16, float16 or int8. Fewer bits are read faster; 16-bit files
    stay as they are."""

    def __post_init__(self):
        for name in ("rows", "max_new_tokens", "max_choices", "prefill_tokens", "max_request_bytes"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} = {getattr(self, name)}: must be 1 or more")
        for name in ("queue", "context", "shutdown_timeout"):
            if not getattr(self, name) >= 0:
                raise UserError(f"{name} = {getattr(self, name)}: must be 0 or more")
        if not self.host:  # would be every address of this machine
            raise UserError("host is empty: 127.0.0.1 is this machine alone, 0.0.0.0 everybody who can reach it")
        if not 0 <= self.port <= 65535:
            raise UserError(f"port = {self.port}: must be 0 to 65535")
        if not self.timeout > 0:
            raise UserError(f"timeout = {self.timeout}: must be above 0")
        check_storage(self.dtype, self.device)
        self.adapter_folders()

    def adapter_folders(self):
        """{name: folder} of `adapters`."""
        return adapter_folders(self.adapters)


def listed(text):
    """The entries of a setting with commas between."""
    return [part.strip() for part in text.split(",") if part.strip()]
