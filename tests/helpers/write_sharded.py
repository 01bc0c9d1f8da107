"""One rank of two that write a sharded checkpoint: python write_sharded.py RANK FOLDER."""

import os
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from systems import leave_group, loopback
from torch import nn
from torch.distributed.fsdp import fully_shard

warnings.simplefilter("ignore")
rank, folder = int(sys.argv[1]), Path(sys.argv[2])
os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback())
dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2)
net = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5))
net.load_state_dict(torch.load(folder / "full.pt"))
fully_shard(net, mesh=dist.device_mesh.init_device_mesh("cpu", (2,)))
dcp.save({"model": net.state_dict(), "step": 3}, checkpoint_id=folder / "sharded")
leave_group()
