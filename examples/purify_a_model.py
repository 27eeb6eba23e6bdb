"""Take a backdoor out of a model with a hundred clean pictures and no labels.

python examples/purify_a_model.py
"""

from common import backdoored

import bimask

victim = backdoored()
splits = victim.spec.load_data()
images = splits.train.clean_subset(10, seed=0).floats()  # ten of each class, in [0, 1]

result = bimask.purify(victim.model, images, bimask.PurifyConfig.profile("robust"))
cleaned = result.model()  # a plain torch module; the victim is left as it was

# the trigger is known here, so that what is left of the backdoor can be measured
test = victim.eval_sets(splits, "test")
for name, model in (("before", victim.model), ("after", cleaned)):
    scores = bimask.evaluate(model, test)
    accuracy, success = scores.clean_accuracy, scores.attack_success
    print(f"{name}: clean accuracy {accuracy:.3f}, attack success {success:.3f}")
