//! Instruction sets. Every loop over elements is compiled for the features that the target guarantees, and for AVX2. At
//! run time the processor decides which copy runs.
//!
//! The copies of an elementwise loop do the same operations in the same order, so they give the same bits: if the
//! processor has no fused multiply-add, a function computes it. Products use fused multiply-add only if the processor
//! has it ([`super::matmul`]), so their bits depend on the processor.

/// Instruction set that loops are compiled for. A later one includes all earlier ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// Features that the compilation target guarantees.
    Target,
    /// AVX2 with FMA and F16C.
    Avx2,
    /// AVX-512F.
    Avx512,
}

impl Isa {
    /// Returns the last instruction set that this processor has.
    #[cfg(target_arch = "x86_64")]
    pub fn best() -> Isa {
        use std::is_x86_feature_detected as has;
        // The standard library queries the processor once and caches the answer.
        if !(has!("avx2") && has!("fma") && has!("f16c")) {
            Isa::Target
        } else if has!("avx512f") {
            Isa::Avx512
        } else {
            Isa::Avx2
        }
    }
    /// Returns the last instruction set that this processor has.
    #[cfg(not(target_arch = "x86_64"))]
    pub fn best() -> Isa {
        Isa::Target
    }
}

/// Defines a function whose body is compiled for the target and for [`Isa::Avx2`]. It runs the copy that the processor
/// supports.
macro_rules! dispatched {
    ($(#[$attribute:meta])*
     $visibility:vis fn $name:ident($($argument:ident: $type:ty),* $(,)?) $(-> $result:ty)? $body:block) => {
        $(#[$attribute])*
        #[inline(never)]
        $visibility fn $name($($argument: $type),*) $(-> $result)? {
            #[inline(always)]
            fn body($($argument: $type),*) $(-> $result)? $body

            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2,fma,f16c")]
                fn avx2($($argument: $type),*) $(-> $result)? {
                    body($($argument),*)
                }
                if $crate::arch::cpu::isa::Isa::best() >= $crate::arch::cpu::isa::Isa::Avx2 {
                    // SAFETY: this processor has the features that `avx2` is compiled for.
                    return unsafe { avx2($($argument),*) };
                }
            }
            body($($argument),*)
        }
    };
}
pub(super) use dispatched;
