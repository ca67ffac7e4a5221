//! All compiled kernels in one list: their launches, and the families in which they are compiled.

use core::mem::offset_of;
use std::vec::Vec;

use super::{BACKWARD_VARIANTS, TOTAL_VARIANTS, VARIANTS};
use crate::attention::features::{Features, Scored};
use crate::attention::schedule::{SCHEDULE, SCHEDULE_THREADS};
use crate::attention::sequences::Sequences;
use crate::ground::constants::{ConstantPlace, Form};
use crate::ground::tensor::TensorMap;
use crate::params::{
    BackwardBase, BackwardParams, ForwardBase, ForwardParams, ROW_KERNEL_THREADS, SINK_GRADIENTS, TotalParams,
};

/// Kernels that one rustc process compiles, and that one compressed stream holds. `entry` selects them by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Family(&'static str);

impl Family {
    /// All families. Those that take longest to compile are first, so that parallel processes end together.
    pub const ALL: [Family; 10] = [
        Family("forward_d128"),
        Family("piecewise"),
        Family("piecewise_dropout"),
        Family("forward_dropout"),
        Family("forward_d256"),
        Family("backward"),
        Family("backward_dropout"),
        Family("piecewise_backward"),
        Family("piecewise_backward_dropout"),
        Family("total"),
    ];

    /// Value of the `cfg` with which `entry` compiles this family.
    pub const fn name(self) -> &'static str {
        self.0
    }
}

/// Name of the kernel that writes a dropout mask. Its parameter is a
/// [`DropoutMaskParams`](crate::params::DropoutMaskParams), its CTAs have [`ROW_KERNEL_THREADS`], and any number of
/// them will do.
pub const DROPOUT_MASK: &str = "dropout_mask";

/// Facts that the build needs about a kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launch {
    /// Name of the kernel's entry point.
    pub symbol: &'static str,
    pub family: Family,
    /// Number of threads of a CTA.
    pub threads: u32,
    /// Number of CTAs of a cluster.
    pub cluster: u32,
    /// True if the kernel has a mainloop, with tensor cores, TMA and register reallocation.
    pub mainloop: bool,
    /// Places of its specialisation constants.
    pub constants: Vec<ConstantPlace>,
    /// Forms that the build makes.
    pub prebuilt: &'static [Form],
}

impl Launch {
    /// Returns the forms that the build makes: the only one of a kernel without constants, or those of `prebuilt`.
    pub fn forms(&self) -> Vec<Form> {
        let mut forms: Vec<Form> = Vec::new();
        let only = if self.constants.is_empty() { &[Form::GENERAL] } else { self.prebuilt };
        for form in only.iter().map(|form| form.only(&self.constants)) {
            if !forms.contains(&form) {
                forms.push(form);
            }
        }
        forms
    }
}

/// Returns the places of constants that lie at this offset in the launch parameter.
fn at(offset: usize, places: &[ConstantPlace]) -> Vec<ConstantPlace> {
    places.iter().map(|place| ConstantPlace { offset: offset as u32 + place.offset, ..*place }).collect()
}

fn both(mut places: Vec<ConstantPlace>, more: Vec<ConstantPlace>) -> Vec<ConstantPlace> {
    places.extend(more);
    places
}

/// Lists every kernel, each once.
pub fn launches() -> Vec<Launch> {
    let forward_features = offset_of!(ForwardParams<TensorMap, Scored>, features);
    let forward_sequences = offset_of!(ForwardBase<TensorMap>, sequences);
    let backward_features = offset_of!(BackwardParams<TensorMap, Scored>, features);
    let backward_sequences = offset_of!(BackwardBase<TensorMap>, sequences);
    let total_features = offset_of!(TotalParams<TensorMap, Scored>, features);
    let total_sequences = offset_of!(TotalParams<TensorMap, Scored>, sequences);
    let forward = VARIANTS.iter().map(|v| Launch {
        symbol: v.symbol,
        family: Family(v.family),
        threads: v.threads(),
        cluster: v.cluster,
        mainloop: true,
        constants: both(at(forward_features, &(v.constants)()), at(forward_sequences, Sequences::CONSTANTS)),
        prebuilt: v.prebuilt,
    });
    let backward = BACKWARD_VARIANTS.iter().map(|v| Launch {
        symbol: v.symbol,
        family: Family(v.family),
        threads: v.threads(),
        cluster: 1,
        mainloop: true,
        constants: both(at(backward_features, &(v.constants)()), at(backward_sequences, Sequences::CONSTANTS)),
        prebuilt: v.prebuilt,
    });
    let total = TOTAL_VARIANTS.iter().map(|v| Launch {
        symbol: v.symbol,
        family: Family("total"),
        threads: v.threads(),
        cluster: 1,
        mainloop: true,
        constants: both(at(total_features, &Scored::constants()), at(total_sequences, Sequences::CONSTANTS)),
        prebuilt: v.prebuilt,
    });
    let mut rows: Vec<&str> = BACKWARD_VARIANTS.iter().flat_map(|v| [v.prepare, v.finish]).collect();
    rows.push(DROPOUT_MASK);
    rows.sort_unstable();
    rows.dedup();
    rows.push(SINK_GRADIENTS);
    let rows = rows.into_iter().map(|symbol| Launch {
        symbol,
        family: Family("backward"),
        threads: ROW_KERNEL_THREADS,
        cluster: 1,
        mainloop: false,
        constants: Vec::new(),
        prebuilt: &[],
    });
    let schedule = Launch {
        symbol: SCHEDULE,
        family: Family("backward"),
        threads: SCHEDULE_THREADS,
        cluster: 1,
        mainloop: false,
        constants: Vec::new(),
        prebuilt: &[],
    };
    forward.chain(backward).chain(total).chain(rows).chain([schedule]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ground::constants::Constants;

    #[test]
    fn every_kernel_is_in_a_family() {
        let launches = launches();
        assert!(launches.iter().all(|launch| Family::ALL.contains(&launch.family)));
        assert!(Family::ALL.iter().all(|family| launches.iter().any(|launch| launch.family == *family)));
    }

    /// Kernels that are used for some masks alone need no other forms.
    #[test]
    fn forms_cover_every_combination_of_constants() {
        for launch in launches().iter().filter(|launch| !launch.symbol.contains("_c2") && !launch.symbol.contains("_n"))
        {
            for bits in 0..1 << Constants::NAMES.len() {
                let wanted = Constants::from_bits(bits).only(&launch.constants);
                assert!(launch.forms().iter().any(|form| form.covers(wanted)), "{} {wanted:?}", launch.symbol);
            }
        }
    }
}
