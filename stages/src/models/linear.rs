//! A linear map with or without bias, made of one or more published tensors that lie one below the
//! other (q, k, v; gate, up). Knows no names but those it is given.

use super::params::{Builder, Init, Part, Slot};
use crate::ops::gemm::{linear, linear_add, linear_dw, linear_dx};
use crate::ops::vector::{add_columns, add_rows};

/// Where weight `[outputs, inputs]` and bias `[outputs]` lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Linear {
    /// The weight.
    pub w: Slot,
    /// The bias.
    pub b: Option<Slot>,
}

impl Linear {
    /// Declares `{name}.weight` (and `{name}.bias`) for each of `parts`, name and outputs.
    pub fn declare(
        parts: &[(String, usize)],
        inputs: usize,
        (part, init, bias): (Part, Init, bool),
        builder: &mut Builder,
    ) -> Linear {
        let weight = |(name, rows): &(String, usize), builder: &mut Builder| {
            builder.matrix(format!("{name}.weight"), *rows, inputs, part, init)
        };
        let join = |a: Option<Slot>, b: Slot| Some(a.map_or(b, |a| a.join(b)));
        let w = parts.iter().fold(None, |w, one| join(w, weight(one, builder)));
        let b = parts.iter().filter(|_| bias).fold(None, |b, (name, rows)| {
            let one = builder.column(format!("{name}.bias"), *rows, part, Init::Constant(0.0));
            join(b, one)
        });
        Linear { w: w.expect("at least one part"), b }
    }

    /// Outputs.
    pub fn outputs(&self) -> usize {
        self.w.rows
    }

    /// Inputs.
    pub fn inputs(&self) -> usize {
        self.w.cols
    }

    /// `y = x Wᵀ + b`, `x_ni` → `y_no`.
    pub fn forward(&self, params: &[f32], n: usize, x_ni: &[f32], y_no: &mut [f32]) {
        linear(n, self.inputs(), self.outputs(), x_ni, self.w.of(params), y_no);
        self.add_bias(params, y_no);
    }

    /// `y += x Wᵀ + b`.
    pub fn forward_add(&self, params: &[f32], n: usize, x_ni: &[f32], y_no: &mut [f32]) {
        linear_add(n, self.inputs(), self.outputs(), x_ni, self.w.of(params), y_no);
        self.add_bias(params, y_no);
    }

    /// Adds the bias to every row.
    pub fn add_bias(&self, params: &[f32], y_no: &mut [f32]) {
        if let Some(b) = self.b {
            add_rows(y_no, b.of(params));
        }
    }

    /// `dx = dy W` (overwritten).
    pub fn backward_input(&self, params: &[f32], n: usize, dy_no: &[f32], dx_ni: &mut [f32]) {
        linear_dx(n, self.inputs(), self.outputs(), dy_no, self.w.of(params), dx_ni);
    }

    /// `dW += dyᵀ x`, `db += Σ dy`.
    pub fn backward_weight(&self, n: usize, dy_no: &[f32], x_ni: &[f32], grads: &mut [f32]) {
        linear_dw(n, self.inputs(), self.outputs(), dy_no, x_ni, self.w.of_mut(grads));
        if let Some(b) = self.b {
            add_columns(&dy_no[..n * self.outputs()], b.of_mut(grads));
        }
    }
}
