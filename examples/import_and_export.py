"""Read a victim of BackdoorBench, take its backdoor out, and write the result as BackdoorBench's file.

python examples/import_and_export.py
"""

import tempfile
from pathlib import Path

from common import attack_result

import bimask
from bimask.data import load_data
from bimask.interop import read_checkpoint, write_attack_result

place = Path(tempfile.mkdtemp())
data = place / "data"
attack_result(place / "record" / "badnet", data)  # it stands for a folder that you downloaded

victim = read_checkpoint(place / "record" / "badnet", clean_data=f"imagefolder:{data}")
images = load_data(f"imagefolder:{data}").train.clean_subset(10, seed=0).floats()
cleaned = bimask.purify(victim.model, images, bimask.PurifyConfig.profile("fast")).model()

out = place / "record" / "cleaned"
notes = write_attack_result(
    out,
    net=victim.net,
    model=cleaned,
    sets=victim.sets,
    clean_index=victim.clean_index,
    dataset=victim.dataset,
)
again = read_checkpoint(out, clean_data=f"imagefolder:{data}")  # the numbers that BackdoorBench finds
for name, scores in (("before", victim.scores), ("after", again.scores)):
    accuracy, success = scores.clean_accuracy, scores.attack_success
    print(f"{name}: clean accuracy {accuracy:.3f}, attack success {success:.3f}")
print(*notes, f"written: {out}", sep="\n")
