"""MMEngine imports this module for a config with type='kdhooks.…'; nothing else imports it."""

from mmengine.registry import HOOKS as ALL_HOOKS
from mmengine.registry import MODELS as ALL_MODELS
from mmengine.registry import Registry

_LOCATIONS = ["kdhooks_integrations.mmengine"]

MODELS = Registry("model", parent=ALL_MODELS, scope="kdhooks", locations=_LOCATIONS)
HOOKS = Registry("hook", parent=ALL_HOOKS, scope="kdhooks", locations=_LOCATIONS)
