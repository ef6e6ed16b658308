"""All processes of a cluster."""

import os

# Before anything imports gRPC. Its handlers for forks end one in thirty children of a process that is busy
# with calls (SIGSEGV, before exec), and serve only children that go on as the same program: ours do not.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
