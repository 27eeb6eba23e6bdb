"""Ask whether a model is backdoored, and towards which class, from clean pictures alone.

python examples/audit_a_model.py
"""

from common import backdoored

from bimask.inspection.audit import audit

victim = backdoored()
images = victim.spec.load_data().train.clean_subset(10, seed=0).floats()

found = audit(victim.model, images)
print("verdict:", found.verdict, "- suspected class:", victim.classes[found.target])
for reason in found.reasons:
    print("  ", reason)
