"""The dense reference's Kronecker curvatures: KFAC, EKFAC, and the cooperation of a player's two affine modules.

Everything is built as a full matrix C [m_t, m_t] of the player's control vector, whose parameters are those of
`Stage.parameters`, each flattened. Inputs and output derivatives of the modules come from the stage functions of
`nets.py`, patches from slicing, per-sample gradients from the dense Jacobians; the value statistics are V_h, the
derivative of the value function pulled back through the stage to the module's output, over the sample's weight.

Letters, beside those of `oracle.py`:

    L   positions (output pixels, tokens); 1 if there are none        I   inputs of a block, O outputs
    x   a block's input at a position [N, L, I], a last 1 for the bias
    y   the derivative of the sample's own loss (or value) by its output [N, L, O]
    A   input factor [I, I], B output factor [O, O]
    g   per-sample gradient [N, O, I], which is sum_p y x^T

A *block* is what has one pair of factors: [weight | bias] of one channel group of a module; with
"spatially_uncorrelated" factors the weight and the bias are two blocks, and the weight's A, over channels, stands
for A (x) I_taps. The [O, I] of a block is flattened row by row, so its matrix is torch.kron(B, A), and coordinates
E_B^T g E_A of a gradient are torch.kron(E_B, E_A)^T vec(g).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal, Protocol

import torch
from nets import AffineCall, Live, Parameters, Recorder, Stage
from oracle import (
    Buffers,
    Evidence,
    OptimizerRule,
    Options,
    PlayerBuffers,
    PlayerRule,
    flatten_control,
    flatten_live,
    unflatten_control,
)
from torch import Tensor
from torch.nn import functional

FactorKind = Literal["unfolded", "reduced", "spatially_uncorrelated"]


# --- inputs and factors of a module -------------------------------------------------------------------------


def patches(x: Tensor, kernel: Sequence[int], stride: int, padding: int, dilation: int) -> Tensor:
    """What each output position reads: [N, C, *size] -> [N, L, C * taps], channels first, then taps row by row."""
    size = [(n + 2 * padding - dilation * (k - 1) - 1) // stride + 1 for n, k in zip(x.shape[2:], kernel, strict=True)]
    x = functional.pad(x, [padding, padding] * len(size))
    taps = []
    for tap in product(*(range(k) for k in kernel)):
        window = [slice(None), slice(None)]
        window += [
            slice(dilation * t, dilation * t + stride * (n - 1) + 1, stride) for t, n in zip(tap, size, strict=True)
        ]
        taps.append(x[tuple(window)].flatten(2))
    return torch.stack(taps, 2).flatten(1, 2).transpose(1, 2)


@dataclass(frozen=True)
class Block:
    """A part of a player's control with one pair of factors.

    name: module, channel group, and which part if the bias is apart.
    positions [O, I]: where the block's controls stand in the control vector.
    taps: A is [I / taps, I / taps] and stands for A (x) I_taps.
    """

    name: str
    positions: Tensor
    taps: int = 1

    @property
    def index(self) -> Tensor:
        """The positions as a vector [O * I]."""
        return self.positions.flatten()


@dataclass(frozen=True)
class Factors:
    """A [I / taps, I / taps] and B [O, O]."""

    A: Tensor
    B: Tensor


@dataclass(frozen=True)
class BlockSamples:
    """What a batch says of a block: x [N, L, I] (None with "spatially_uncorrelated"), y [N, L, O], its factors."""

    x: Tensor | None
    y: Tensor
    factors: Factors


def blocks_of(call: AffineCall, starts: Mapping[str, int], kind: FactorKind) -> list[Block]:
    """The module's blocks; starts: where each parameter begins in the control vector."""
    rows = len(call.weight) // call.groups
    weight = starts[f"{call.module}.weight"] + torch.arange(call.weight.numel()).view(len(call.weight), -1)
    bias = None
    if call.bias is not None:
        bias = starts[f"{call.module}.bias"] + torch.arange(len(call.bias))[:, None]
    blocks = []
    for k in range(call.groups):
        name, of_group = f"{call.module}.{k}", slice(k * rows, (k + 1) * rows)
        if kind == "spatially_uncorrelated":
            blocks.append(Block(f"{name}.weight", weight[of_group], taps=call.weight[0, 0].numel()))
            if bias is not None:
                blocks.append(Block(f"{name}.bias", bias[of_group]))
        else:
            parts = [weight] if bias is None else [weight, bias]
            blocks.append(Block(name, torch.cat(parts, 1)[of_group]))
    return blocks


def block_samples(call: AffineCall, y: Tensor, kind: FactorKind) -> list[BlockSamples]:
    """The batch's x, y and factors of each of the module's blocks, in the order of `blocks_of`.

    y: like the module's output.

    * "unfolded": A = 1/N sum_b sum_p x x^T, B = 1/(N L) sum_b sum_p y y^T.
    * "reduced": A = 1/N sum_b xbar xbar^T, B = 1/N sum_b ysum ysum^T with the positions' mean of x and sum of y.
    * "spatially_uncorrelated": A over the channels of all pixels of the image (no padding), divided by the
      strides, so that it stands for L positions; B as unfolded; the bias has A = L.
    """
    inputs = call.input.detach()
    if call.kind == "conv":
        kernel = call.weight.shape[2:]
        y = y.flatten(2).transpose(1, 2)
        channels = inputs.chunk(call.groups, 1)
        x_of = [patches(part, kernel, call.stride, call.padding, call.dilation) for part in channels]
        pixels = [part.flatten(2).transpose(1, 2) for part in channels]
        strides = call.stride ** len(kernel)
    else:
        pixels = x_of = [inputs.reshape(len(inputs), -1, inputs.shape[-1])]
        y = y.reshape(len(y), -1, y.shape[-1])
        strides = 1

    N, L = y.shape[:2]
    result = []
    for x, pixel, y_k in zip(x_of, pixels, y.chunk(call.groups, 2), strict=True):
        if kind == "spatially_uncorrelated":
            B = torch.einsum("npo,npq->oq", y_k, y_k) / (N * L)
            A = torch.einsum("npc,npd->cd", pixel, pixel) / (N * strides)
            result.append(BlockSamples(None, y_k, Factors(A, B)))
            if call.bias is not None:
                result.append(BlockSamples(None, y_k, Factors(torch.full((1, 1), float(L), dtype=y.dtype), B)))
            continue
        if call.bias is not None:
            x = torch.cat([x, torch.ones_like(x[..., :1])], 2)
        result.append(BlockSamples(x, y_k, cross_factors(x, y_k, x, y_k, kind)))
    return result


def cross_factors(x_u: Tensor, y_u: Tensor, x_v: Tensor, y_v: Tensor, kind: FactorKind) -> Factors:
    """A_uv [I_u, I_v] and B_uv [O_u, O_v] of two blocks (of one block: its own factors)."""
    N, L = y_u.shape[:2]
    if kind == "reduced":
        A = torch.einsum("ni,nj->ij", x_u.mean(1), x_v.mean(1)) / N
        return Factors(A, torch.einsum("no,nq->oq", y_u.sum(1), y_v.sum(1)) / N)
    if x_u.shape[1] != x_v.shape[1]:
        raise ValueError(f"unfolded cross factors need the same positions; these are {x_u.shape[1]}, {x_v.shape[1]}")
    A = torch.einsum("npi,npj->ij", x_u, x_v) / N
    return Factors(A, torch.einsum("npo,npq->oq", y_u, y_v) / (N * L))


# --- curvature matrices -------------------------------------------------------------------------------------


def damped(factors: Factors, damping: float) -> Factors:
    """KFAC's factored damping: A + pi sqrt(damping) I, B + sqrt(damping) / pi I, pi^2 = (tr A / dim) / (tr B / dim)."""
    A, B = factors.A, factors.B
    pi = float(((A.trace() / len(A)) / (B.trace() / len(B))).sqrt())
    if not 0 < pi < float("inf"):
        raise ValueError("a factor is zero, so the trace ratio of KFAC's damping is not defined")
    root = damping**0.5
    return Factors(A + pi * root * torch.eye(len(A), dtype=A.dtype), B + root / pi * torch.eye(len(B), dtype=B.dtype))


def kron(factors: Factors, taps: int = 1) -> Tensor:
    """The block's matrix for controls [O, I] flattened row by row."""
    unit = torch.eye(taps, dtype=factors.A.dtype)
    return torch.kron(factors.B.contiguous(), torch.kron(factors.A.contiguous(), unit))


def joint(uu: Tensor, uv: Tensor, vv: Tensor) -> Tensor:
    """[[uu, uv], [uv^T, vv]]."""
    return torch.cat([torch.cat([uu, uv], 1), torch.cat([uv.T, vv], 1)])


def theorem3_inverse(uu: Factors, vv: Factors, uv: Factors) -> Tensor:
    """C^-1 from the cooperative gains of Theorem 3, with damped uu and vv.

    k~_u = -(A~_uu (x) B~_uu)^-1 (p_u - (A_uv (x) B_uv) (A_vv (x) B_vv)^-1 p_v), A~_uu = A_uu - A_uv A_vv^-1 A_vu, B~
    likewise, and the same with u and v exchanged: (k~_u, k~_v) = -C^-1 (p_u, p_v).
    """

    def schur(uu: Tensor, uv: Tensor, vv: Tensor) -> Tensor:
        return uu - uv @ torch.linalg.inv(vv) @ uv.T

    of_u = torch.linalg.inv(kron(Factors(schur(uu.A, uv.A, vv.A), schur(uu.B, uv.B, vv.B))))
    of_v = torch.linalg.inv(kron(Factors(schur(vv.A, uv.A.T, uu.A), schur(vv.B, uv.B.T, uu.B))))
    cross = kron(uv)
    for_u = torch.cat([of_u, -of_u @ cross @ torch.linalg.inv(kron(vv))], 1)
    for_v = torch.cat([-of_v @ cross.T @ torch.linalg.inv(kron(uu)), of_v], 1)
    inverse = torch.cat([for_u, for_v])
    if (inverse - inverse.T).abs().max() > 1e-8 * inverse.abs().max():
        raise ArithmeticError("Theorem 3's two gains do not make a symmetric inverse")
    return (inverse + inverse.T) / 2


@dataclass(frozen=True)
class Canonical:
    """Canonical coordinates of two damped factors and their cross factor, F_uu = L L^T, F_vv = K K^T.

    L^-1 F_uv K^-T = P diag(sigma) W^T;  E_u = L^-T P, E_v = K^-T W (P, W square), so E_u^T F_uu E_u = I,
    E_v^T F_vv E_v = I and E_u^T F_uv E_v = diag(sigma).
    """

    E_u: Tensor
    E_v: Tensor
    sigma: Tensor


def canonical(F_uu: Tensor, F_vv: Tensor, F_uv: Tensor) -> Canonical:
    """The coordinates; unique but for signs where the sigma are distinct and none is 0 or left without a partner."""
    L, K = torch.linalg.cholesky(F_uu), torch.linalg.cholesky(F_vv)
    P, sigma, W = torch.linalg.svd(torch.linalg.inv(L) @ F_uv @ torch.linalg.inv(K).T)
    return Canonical(torch.linalg.inv(L).T @ P, torch.linalg.inv(K).T @ W.T, sigma)


# --- the base optimizers ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kronecker(OptimizerRule):
    """What KFAC and EKFAC share. Statistics belong to the player, momentum buffers to the parameters.

    buf <- mu buf + C^-1 g, p = C buf; the decay is applied to u apart, as AdamW's. Factors are updated in steps
    t = 0, 1, ... with t % factor_every == 0, bases then where t % basis_every == 0.
    """

    lr: float
    weight_decay: float = 0.0
    mu: float = 0.0
    damping: float = 0.03
    factor_decay: float = 0.95
    factor_every: int = 1
    basis_every: int = 50
    factors: FactorKind = "unfolded"
    fisher: Literal["empirical", "sampled"] = "empirical"

    corrected = False
    """Whether the eigenvalues are second moments of per-sample gradients (EKFAC)."""

    def of_player(self, stage: Stage, parameters: Parameters, live: Live, options: Options) -> PlayerRule:
        if self.fisher == "sampled" and options.statistics == "value":
            raise ValueError("fisher='sampled' and statistics='value' exclude each other")
        if options.cooperation == "theorem3" and self.corrected:
            raise ValueError("cooperation='theorem3' is not defined for EKFAC")
        if options.cooperation in ("exact", "theorem3") and self.factors == "spatially_uncorrelated":
            raise ValueError(f"cooperation={options.cooperation!r} has no spatially uncorrelated cross factors")
        bases: dict[str, Kronecker] = {}
        for name in stage.parameters:
            base = options.base_of(name)
            if not isinstance(base, Kronecker):
                raise TypeError(f"{name}: {base} is not a Kronecker base")
            if _without_own(base) != _without_own(self):
                raise ValueError(f"{name}: within a player only weight_decay and mu may differ")
            bases[name] = base
        return KroneckerRule(self, bases, stage, parameters, live, options.cooperation)


@dataclass(frozen=True)
class KFAC(Kronecker):
    """C = (A + pi sqrt(damping) I) (x) (B + sqrt(damping) / pi I), the factors as of the last basis refresh."""


@dataclass(frozen=True)
class EKFAC(Kronecker):
    """C in the factors' eigenbasis of the last refresh, with corrected eigenvalues and damping added to them."""

    corrected = True


def _without_own(base: Kronecker) -> list[object]:
    """A base's type and its options but those that a parameter may have for itself."""
    return [type(base), *(value for name, value in vars(base).items() if name not in ("weight_decay", "mu"))]


class KroneckerRule(PlayerRule):
    """The rule of one player. Its statistics are under the player's name, with these keys:

    <block>:A, :B               running factors
    <block>:A_used, :B_used     the factors of the last basis refresh
    <block>:U_A, :U_B, :s       EKFAC: their eigenvectors, and the second moments [O, I / taps * taps]
    <pair>:A, :B, :A_used, :B_used                                          the same of cross factors
    <pair>:E_Au, :E_Av, :E_Bu, :E_Bv, :m_uu [O_u, I_u], :m_vv, :m_uv [O, I] of pairs   EKFAC with cooperation "exact"
    <parameter>:d               normalisation parameters
    """

    adaptive = True

    def __init__(
        self,
        base: Kronecker,
        bases: Mapping[str, Kronecker],
        stage: Stage,
        parameters: Parameters,
        live: Live,
        cooperation: str,
    ) -> None:
        self.base, self.bases, self.stage, self.parameters = base, bases, stage, parameters
        recorder = Recorder({name: value.detach().clone().requires_grad_() for name, value in parameters.items()})
        self.output = flatten_live(stage.function(recorder, tuple(part.detach() for part in live)))
        order = {name.rpartition(".")[0]: i for i, name in reversed(list(enumerate(stage.parameters)))}
        self.calls = sorted(recorder.calls, key=lambda call: order[call.module])
        if len({call.module for call in self.calls}) != len(self.calls):
            raise ValueError(f"{stage.name}: a module that is called twice has no Kronecker curvature")

        starts, start = {}, 0
        for name in stage.parameters:
            starts[name] = start
            start += parameters[name].numel()
        self.size = start
        self.lr = torch.full((start,), base.lr, dtype=torch.float64)
        self.blocks = [blocks_of(call, starts, base.factors) for call in self.calls]  # by module
        inside = torch.cat([torch.empty(0, dtype=torch.long), *(b.index for of in self.blocks for b in of)])
        self.scalars = {  # normalisation parameters
            name: starts[name] + torch.arange(parameters[name].numel())
            for name in stage.parameters
            if starts[name] not in inside
        }

        self.cooperation = cooperation if len(self.calls) > 1 else "none"
        self.pairs: list[tuple[Block, Block]] = []
        if self.cooperation != "none":
            if len(self.calls) != 2 or len(self.blocks[0]) != len(self.blocks[1]):
                raise ValueError(
                    f"{stage.name}: cooperation is between two modules with the same channel groups, not "
                    f"{[(call.module, call.groups) for call in self.calls]}"
                )
            self.pairs = list(zip(*self.blocks, strict=True))

    # Momentum and decay.

    def _vector(self, option: Literal["mu", "weight_decay"]) -> Tensor:
        return flatten_control(
            self.stage, lambda name: torch.full_like(self.parameters[name], getattr(self.bases[name], option))
        )

    def _decayed_momentum(self, old: PlayerBuffers) -> Tensor:
        """mu buf."""

        def buffer(name: str) -> Tensor:
            return old.get(name, {}).get("momentum_buffer", torch.zeros_like(self.parameters[name]))

        return self._vector("mu") * flatten_control(self.stage, buffer)

    def _kept(self, buffer: Tensor) -> PlayerBuffers:
        parts = unflatten_control(self.stage, buffer, self.parameters)
        return {name: {"momentum_buffer": parts[name]} for name in parts if self.bases[name].mu != 0}

    def momentum(self, old: PlayerBuffers, C: Tensor, gradient: Tensor, step: int) -> PlayerBuffers:
        return self._kept(self._decayed_momentum(old) + torch.linalg.solve(C, gradient))

    def direction(self, old: PlayerBuffers, C: Tensor, gradient: Tensor, step: int) -> Tensor:
        return gradient + C @ self._decayed_momentum(old)

    def correct(self, momentum: PlayerBuffers, C: Tensor, correction: Tensor, step: int) -> PlayerBuffers:
        added = unflatten_control(self.stage, torch.linalg.solve(C, correction), self.parameters)
        return {name: {"momentum_buffer": buf["momentum_buffer"] + added[name]} for name, buf in momentum.items()}

    def decayed(self) -> Tensor:
        u = flatten_control(self.stage, self.parameters.__getitem__)
        return (1 - self.lr * self._vector("weight_decay")) * u

    # Statistics.

    def output_derivatives(self, cotangent: Tensor) -> list[Tensor]:
        """The cotangent [N, n_t+1] at the cut after the stage, pulled back to the output of each affine module."""
        if not self.calls:
            return []
        outputs = [call.output for call in self.calls]
        return list(torch.autograd.grad(self.output, outputs, cotangent, retain_graph=True))

    def statistics(self, old: PlayerBuffers, gradient: Tensor, evidence: Evidence, step: int) -> PlayerBuffers:
        base, t = self.base, step - 1
        new: Buffers = dict(old.get(self.stage.name, {}))
        cotangent = evidence.cotangent
        if base.fisher == "sampled":
            if evidence.sampled is None:
                raise ValueError("fisher='sampled' needs sampled_labels")
            cotangent = evidence.sampled
        g = torch.einsum("nxu,nx->nu", evidence.F_u, cotangent)
        update, refresh = t % base.factor_every == 0, t % base.basis_every == 0

        def average(key: str, of_batch: Tensor) -> None:
            decay = base.factor_decay
            new[key] = decay * new[key] + (1 - decay) * of_batch if key in new else of_batch

        if update:
            self._update_factors(cotangent, average)
            for name, index in self.scalars.items():
                average(f"{name}:d", (g[:, index] ** 2).mean(0))
        if refresh:
            self._refresh(new)
        if update and base.corrected:
            self._correct_eigenvalues(g, new, average)
        return {self.stage.name: new}

    def _update_factors(self, cotangent: Tensor, average: _Average) -> None:
        samples = [
            block_samples(call, y, self.base.factors)
            for call, y in zip(self.calls, self.output_derivatives(cotangent), strict=True)
        ]
        for blocks, of_module in zip(self.blocks, samples, strict=True):
            for block, data in zip(blocks, of_module, strict=True):
                average(f"{block.name}:A", data.factors.A)
                average(f"{block.name}:B", data.factors.B)
        if not self.pairs:
            return
        if self.cooperation == "corollary7":
            self._check_twins(samples)
            return
        for (u, v), data_u, data_v in zip(self.pairs, *samples, strict=True):
            assert data_u.x is not None and data_v.x is not None
            cross = cross_factors(data_u.x, data_u.y, data_v.x, data_v.y, self.base.factors)
            average(f"{u.name}|{v.name}:A", cross.A)
            average(f"{u.name}|{v.name}:B", cross.B)

    def _check_twins(self, samples: list[list[BlockSamples]]) -> None:
        first, second = self.calls
        same = first.input.shape == second.input.shape and torch.equal(first.input, second.input)
        same = same and first.weight.shape == second.weight.shape and (first.bias is None) == (second.bias is None)
        options = [(call.kind, call.stride, call.padding, call.dilation, call.groups) for call in self.calls]
        same = same and options[0] == options[1]
        same = same and all(torch.allclose(u.y, v.y, rtol=1e-12) for u, v in zip(*samples, strict=True))
        if not same:
            raise ValueError(f"{self.stage.name}: corollary7 needs the same input, shape and output derivative twice")

    def _refresh(self, new: Buffers) -> None:
        """The factors that are used from now on, and EKFAC's bases with the eigenvalues KFAC would have."""
        for block in self._all_blocks():
            A, B = (new[f"{block.name}:{letter}"] for letter in "AB")
            new |= {f"{block.name}:A_used": A, f"{block.name}:B_used": B}
            if self.base.corrected:
                lambda_A, U_A = torch.linalg.eigh(A)
                lambda_B, U_B = torch.linalg.eigh(B)
                s = torch.outer(lambda_B, lambda_A.repeat_interleave(block.taps))
                new |= {f"{block.name}:U_A": U_A, f"{block.name}:U_B": U_B, f"{block.name}:s": s}
        if self.cooperation not in ("exact", "theorem3"):
            return
        for u, v in self.pairs:
            pair = f"{u.name}|{v.name}"
            new |= {f"{pair}:{letter}_used": new[f"{pair}:{letter}"] for letter in "AB"}
            if self.base.corrected:
                uu, vv, uv = self._pair_factors(new, u, v)
                of_A, of_B = canonical(uu.A, vv.A, uv.A), canonical(uu.B, vv.B, uv.B)
                new |= {f"{pair}:E_Au": of_A.E_u, f"{pair}:E_Av": of_A.E_v}
                new |= {f"{pair}:E_Bu": of_B.E_u, f"{pair}:E_Bv": of_B.E_v}
                new[f"{pair}:m_uu"] = torch.ones(len(uu.B), len(uu.A), dtype=uu.A.dtype)
                new[f"{pair}:m_vv"] = torch.ones(len(vv.B), len(vv.A), dtype=vv.A.dtype)
                new[f"{pair}:m_uv"] = torch.outer(of_B.sigma, of_A.sigma)

    def _correct_eigenvalues(self, g: Tensor, new: Buffers, average: _Average) -> None:
        """g [N, m_t]: per-sample gradients."""
        for block in self._all_blocks():
            E = self._basis(new, block)
            average(f"{block.name}:s", ((g[:, block.index] @ E) ** 2).mean(0).view(block.positions.shape))
        if self.cooperation != "exact":
            return
        for u, v in self.pairs:
            pair = f"{u.name}|{v.name}"
            E_u, E_v = self._canonical_basis(new, pair)
            of_u = (g[:, u.index] @ E_u).view(-1, *u.positions.shape)
            of_v = (g[:, v.index] @ E_v).view(-1, *v.positions.shape)
            rows, columns = new[f"{pair}:m_uv"].shape
            average(f"{pair}:m_uu", (of_u**2).mean(0))
            average(f"{pair}:m_vv", (of_v**2).mean(0))
            average(f"{pair}:m_uv", (of_u[:, :rows, :columns] * of_v[:, :rows, :columns]).mean(0))

    def _all_blocks(self) -> list[Block]:
        return [block for blocks in self.blocks for block in blocks]

    def _basis(self, statistics: Buffers, block: Block) -> Tensor:
        """EKFAC's eigenvectors of the block as columns [O I, O I]."""
        return kron(Factors(statistics[f"{block.name}:U_A"], statistics[f"{block.name}:U_B"]), block.taps)

    def _canonical_basis(self, statistics: Buffers, pair: str) -> tuple[Tensor, Tensor]:
        """The coordinates' matrices of u and v."""
        of_u, of_v = (Factors(statistics[f"{pair}:E_A{p}"], statistics[f"{pair}:E_B{p}"]) for p in "uv")
        return kron(of_u), kron(of_v)

    def _pair_factors(self, statistics: Buffers, u: Block, v: Block) -> tuple[Factors, Factors, Factors]:
        """The damped factors of u and of v and the cross factors, as used."""

        def used(name: str) -> Factors:
            return Factors(statistics[f"{name}:A_used"], statistics[f"{name}:B_used"])

        uu, vv = (damped(used(block.name), self.base.damping) for block in (u, v))
        return uu, vv, used(f"{u.name}|{v.name}")

    # Curvature.

    def curvature(self, statistics: PlayerBuffers, step: int) -> Tensor:
        own = statistics[self.stage.name]
        C = torch.full((self.size, self.size), float("nan"), dtype=torch.float64)

        def put(index: Tensor, matrix: Tensor) -> None:
            C[index] = 0
            C[:, index] = 0
            C[index[:, None], index] = matrix

        for name, index in self.scalars.items():
            put(index, torch.diag(own[f"{name}:d"] + self.base.damping))
        if self.cooperation == "none":
            for block in self._all_blocks():
                put(block.index, self.block_curvature(own, block))
        for u, v in self.pairs:
            put(torch.cat([u.index, v.index]), self.pair_curvature(own, u, v))
        if not bool(C.isfinite().all()):
            raise ArithmeticError(f"{self.stage.name}: the curvature is not finite, or leaves out a control")
        return C

    def block_curvature(self, statistics: Buffers, block: Block) -> Tensor:
        """C [O I, O I] of a block by itself."""
        used = Factors(statistics[f"{block.name}:A_used"], statistics[f"{block.name}:B_used"])
        if not self.base.corrected:
            return kron(damped(used, self.base.damping), block.taps)
        E = self._basis(statistics, block)
        return E @ torch.diag(statistics[f"{block.name}:s"].flatten() + self.base.damping) @ E.T

    def pair_curvature(self, statistics: Buffers, u: Block, v: Block) -> Tensor:
        """C of the controls of u, then v."""
        damping = self.base.damping
        if self.cooperation == "corollary7":
            E = torch.linalg.eigh(statistics[f"{u.name}:A_used"]), torch.linalg.eigh(statistics[f"{u.name}:B_used"])
            U = kron(Factors(E[0].eigenvectors, E[1].eigenvectors), u.taps)
            eigenvalues = torch.outer(E[1].eigenvalues, E[0].eigenvalues.repeat_interleave(u.taps)).flatten()
            if self.base.corrected:
                U, eigenvalues = self._basis(statistics, u), statistics[f"{u.name}:s"].flatten()
            own, cross = torch.diag(eigenvalues + damping), torch.diag(eigenvalues)
            return joint(U @ own @ U.T, U @ cross @ U.T, U @ own @ U.T)

        if self.base.corrected:
            pair = f"{u.name}|{v.name}"
            E_u, E_v = self._canonical_basis(statistics, pair)
            m_uu, m_vv, m_uv = (statistics[f"{pair}:m_{which}"] for which in ("uu", "vv", "uv"))
            cross = torch.zeros(m_uu.numel(), m_vv.numel(), dtype=m_uu.dtype)
            for j, i in product(*(range(n) for n in m_uv.shape)):
                cross[j * m_uu.shape[1] + i, j * m_vv.shape[1] + i] = m_uv[j, i]
            D = joint(torch.diag(m_uu.flatten() + damping), cross, torch.diag(m_vv.flatten() + damping))
            # C^-1 g = E (D^-1 (E^T g)), so C = E^-T D E^-1.
            back = torch.linalg.inv(torch.block_diag(E_u, E_v))
            C = back.T @ D @ back
            return (C + C.T) / 2

        uu, vv, uv = self._pair_factors(statistics, u, v)
        if self.cooperation == "exact":
            return joint(kron(uu), kron(uv), kron(vv))
        C = torch.linalg.inv(theorem3_inverse(uu, vv, uv))
        return (C + C.T) / 2


class _Average(Protocol):
    """The type of a function that folds a batch's value into a running average."""

    def __call__(self, key: str, of_batch: Tensor) -> None: ...
