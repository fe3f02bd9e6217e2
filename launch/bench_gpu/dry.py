"""What a dry run of `armillary bench gpu` needs of Triton's interpreter."""

from typing import Any


def mend_loop_bounds() -> None:
    """Lets `range` take its bounds from tensors: triton 3.6's interpreter cannot, where numpy is 2.4 or newer."""
    from triton.runtime import interpreter

    patch_any = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        patch_any(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_lang_tensor
