"""A gradient scattered by lines (`parallel.scatter`) is the one that is scattered at once."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from chinchilla_jax.parallel import scatter


def test_by_lines_it_is_the_same_gradient():
  devices = np.array(jax.devices())
  data, lines = Mesh(devices, ("data",)), Mesh(devices.reshape(4, 2), ("lines", "line"))
  rows = NamedSharding(data, PartitionSpec("data"))
  cut = NamedSharding(data, PartitionSpec(None, "data"))
  by_lines = scatter.Lines(1, (NamedSharding(lines, PartitionSpec("lines")),
                               NamedSharding(lines, PartitionSpec(("lines", "line")))))
  x, y = (jax.device_put(jax.random.normal(jax.random.key(n), (8, 4, 16)), rows) for n in range(2))

  def gradient(how):
    product = lambda x, y: jax.lax.with_sharding_constraint(how(jnp.einsum("btd,btf->df", x, y)),
                                                            cut)
    return jax.jit(product)(x, y)

  one, other = gradient(by_lines), gradient(lambda g: g)
  assert one.sharding.is_equivalent_to(cut, 2)
  np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
