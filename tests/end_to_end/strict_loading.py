"""What the loader says of each folder: `python strict_loading.py FOLDER...`, a line each."""

import sys

import torch

from quantize.protocol import WorkerError
from quantize.workers.loading import load_model

for folder in sys.argv[1:]:
    try:
        load_model(folder, torch.bfloat16)
        print("loaded")
    except WorkerError as error:
        print(error.message.replace("\n", " "))
