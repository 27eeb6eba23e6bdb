"""Take a backdoor out of a detector with a hundred clean pictures and their boxes.

python examples/repair_a_detector.py
"""

from common import backdoored_detector

from bimask.detection import evaluate, purify

detector, clean, test = backdoored_detector()

repaired = purify(detector, clean).model()  # the detector is left as it was

# the trigger is known here, so that what is left of the backdoor can be measured
for name, model in (("before", detector), ("after", repaired)):
    scores = evaluate(model, test)
    found, lost = scores.true_detection, scores.attack_success
    print(f"{name}: mAP@50 {scores.map50:.3f}, attack success {lost:.3f}, true detections {found:.3f}")
