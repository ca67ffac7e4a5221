//! Tests of loading, on a device if there is one, and with a driver that only counts.

use std::cell::Cell;
use std::thread;

use kernels_gpu::ground::constants::{ConstantPlace, Form};

use super::*;
use crate::backend::cuda::Cuda;
use crate::backend::cuda::driver::Extent;

/// Returns the first device, if there is one that kernels run on.
fn device() -> Option<Cuda> {
    Cuda::new(0).inspect_err(|error| println!("skipped: {error}")).ok()
}

#[test]
fn without_a_device_the_error_says_what_is_missing() {
    match sys::calls() {
        Ok(_) => println!("skipped: there is a driver"),
        Err(Error::NoDevice { reason }) => {
            assert!(reason.contains("NVIDIA's driver"), "{reason}");
            assert!(matches!(Cuda::new(0), Err(Error::NoDevice { .. })));
            assert_eq!(Cuda::device_count(), 0);
        }
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn refused_ptx_carries_the_compilers_words() {
    let Some(cuda) = device() else { return };
    let _entered = cuda.device().enter().unwrap();
    let text = ".version 8.1\n.target sm_90a\n.address_size 64\n.visible .entry k() { mov.u32 %nothing, 1; ret; }";
    let error = load_ptx(cuda.device().calls(), "k", text.to_owned()).err().unwrap();
    assert!(matches!(error, Error::Driver { code, .. } if code != sys::SUCCESS), "{error}");
    assert!(error.to_string().contains("nothing"), "{error}");
}

#[test]
fn parameters_of_another_size_are_refused() {
    let Some(cuda) = device() else { return };
    let _entered = cuda.device().enter().unwrap();
    let function = cuda.kernel("prepare_bf16", Constants::NONE, 0, Specialise::Prebuilt).unwrap().function;
    let extent = Extent { grid: 1, block: 32, shared_memory: 0 };
    // SAFETY: refused before the launch.
    let error = unsafe { function.launch(extent, ptr::null_mut(), &0u64) }.err().unwrap();
    assert!(matches!(error, Error::BrokenKernel { symbol: "prepare_bf16", .. }), "{error}");
}

#[test]
fn a_form_that_is_not_prebuilt_is_loaded_on_request() {
    let Some(cuda) = device() else { return };
    let _entered = cuda.device().enter().unwrap();
    let all = || (0..1 << Constants::NAMES.len()).map(Constants::from_bits);
    let form = |symbol, constants, policy| cuda.kernel(symbol, constants, 0, policy).unwrap().form;
    let mut tried = 0;
    for kernel in KERNELS.iter().filter(|kernel| kernel.cubins.len() > 1).take(8) {
        let wanted = all().map(|constants| kernel.specialised(constants)).find(|&form| kernel.find(form).is_none());
        let Some(wanted) = wanted else { continue };
        let constants = wanted.values();
        assert_eq!(form(kernel.symbol, constants, Specialise::Prebuilt), kernel.choose(wanted, Specialise::Prebuilt));
        assert_eq!(form(kernel.symbol, constants, Specialise::AtFirstUse), wanted);
        assert_eq!(form(kernel.symbol, constants, Specialise::Prebuilt), wanted);
        let specialised = kernel.cubins.iter().map(|cubin| cubin.form).filter(|form| form.open() == Constants::NONE);
        for prebuilt in specialised {
            assert_eq!(form(kernel.symbol, prebuilt.values(), Specialise::Prebuilt), prebuilt);
        }
        tried += 1;
    }
    println!("{tried} kernels with a form that is not prebuilt");
}

#[test]
fn codes_without_a_name_are_described() {
    let Some(cuda) = device() else { return };
    for code in [912, 54321, u32::MAX] {
        assert!(cuda.device().calls().describe(code).contains(&code.to_string()));
    }
}

const RIGHT: Constants = Constants::NONE.with(Constants::RIGHT, true);
const LEFT: Constants = Constants::NONE.with(Constants::LEFT, true);
const PLACES: &[ConstantPlace] =
    &[ConstantPlace { bit: Constants::LEFT, offset: 0 }, ConstantPlace { bit: Constants::RIGHT, offset: 4 }];

const GENERAL: Form = Form::of(Constants::NONE).opening(Constants::LEFT).opening(Constants::RIGHT);

/// Calls of a driver that only counts.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Counts {
    cubins: u32,
    compiled: u32,
    unloaded: u32,
    refuses_cubins: bool,
}

thread_local! {
    static COUNTS: Cell<Counts> = Cell::new(Counts::default());
}

fn count(change: impl FnOnce(&mut Counts) -> sys::Code) -> sys::Code {
    let mut counts = COUNTS.get();
    let code = change(&mut counts);
    COUNTS.set(counts);
    code
}

/// Returns a driver that counts in [`COUNTS`] of the calling thread.
fn counting() -> &'static Calls {
    unsafe extern "C" fn load(
        _: *mut Handle,
        _: *const c_void,
        options: u32,
        _: *mut c_int,
        _: *mut *mut c_void,
    ) -> sys::Code {
        count(|counts| match options {
            0 if counts.refuses_cubins => sys::NO_BINARY_FOR_GPU,
            0 => {
                counts.cubins += 1;
                sys::SUCCESS
            }
            // Only PTX is loaded with options.
            _ => {
                counts.compiled += 1;
                sys::SUCCESS
            }
        })
    }
    unsafe extern "C" fn unload(_: Handle) -> sys::Code {
        count(|counts| {
            counts.unloaded += 1;
            sys::SUCCESS
        })
    }
    unsafe extern "C" fn function(_: *mut Handle, _: Handle, _: *const std::ffi::c_char) -> sys::Code {
        sys::SUCCESS
    }
    unsafe extern "C" fn attribute(_: Handle, _: c_int, _: c_int) -> sys::Code {
        sys::SUCCESS
    }
    let calls = Calls {
        cuModuleLoadDataEx: load,
        cuModuleUnload: unload,
        cuModuleGetFunction: function,
        cuFuncSetAttribute: attribute,
        ..Calls::failing()
    };
    Box::leak(Box::new(calls))
}

/// Returns a kernel with two constants, in these forms.
fn kernel(forms: &[Form]) -> &'static Kernel {
    Box::leak(Box::new(Kernel::of("prepare_bf16").unwrap().with_forms(PLACES, forms)))
}

#[test]
fn no_launch_compiles_where_a_general_form_is_prebuilt() {
    let (calls, kernel) = (counting(), kernel(&[GENERAL, Form::of(RIGHT)]));
    let mut forms = Forms::default();
    let get = |forms: &Forms, constants, policy| forms.get(calls, kernel, constants, 0, policy).unwrap().form;
    for _ in 0..2 {
        assert_eq!(get(&forms, RIGHT, Specialise::Prebuilt), Form::of(RIGHT));
        assert_eq!(get(&forms, LEFT, Specialise::Prebuilt), GENERAL);
        assert_eq!(get(&forms, Constants::NONE, Specialise::Prebuilt), GENERAL);
    }
    assert_eq!(COUNTS.get(), Counts { cubins: 2, ..Counts::default() });
    // On request LEFT is compiled, and then used in any case.
    for policy in [Specialise::AtFirstUse, Specialise::Prebuilt] {
        assert_eq!(get(&forms, LEFT, policy), Form::of(LEFT));
    }
    assert_eq!(get(&forms, Constants::NONE, Specialise::Prebuilt), GENERAL);
    assert_eq!(COUNTS.get(), Counts { cubins: 2, compiled: 1, ..Counts::default() });
    // SAFETY: nothing was launched.
    unsafe { forms.unload() };
    assert_eq!(COUNTS.get().unloaded, 3);
    assert!(forms.find(GENERAL).is_none());
}

#[test]
fn a_driver_that_compiles_in_any_case_compiles_the_specialised_form() {
    let calls = counting();
    for (prebuilt, refuses_cubins) in [(&[][..], false), (&[GENERAL, Form::of(RIGHT)], true)] {
        COUNTS.set(Counts { refuses_cubins, ..Counts::default() });
        let (kernel, forms) = (kernel(prebuilt), Forms::default());
        for constants in [LEFT, RIGHT, Constants::NONE, LEFT] {
            let loaded = forms.get(calls, kernel, constants, 0, Specialise::Prebuilt).unwrap();
            assert_eq!(loaded.form, Form::of(constants));
        }
        assert_eq!(COUNTS.get(), Counts { compiled: 3, refuses_cubins, ..Counts::default() });
    }
}

#[test]
fn a_kernel_without_constants_has_one_form() {
    let (calls, forms) = (counting(), Forms::default());
    let kernel = Box::leak(Box::new(Kernel::of("prepare_bf16").unwrap().with_forms(&[], &[Form::of(Constants::NONE)])));
    for (constants, policy) in [(LEFT, Specialise::AtFirstUse), (Constants::NONE, Specialise::Prebuilt)] {
        assert_eq!(forms.get(calls, kernel, constants, 0, policy).unwrap().form, Form::of(Constants::NONE));
    }
    assert_eq!(COUNTS.get(), Counts { cubins: 1, ..Counts::default() });
}

#[test]
fn threads_share_what_one_of_them_has_loaded() {
    let (calls, kernel, forms) = (counting(), kernel(&[GENERAL, Form::of(RIGHT)]), Forms::default());
    let work = || {
        for constants in [LEFT, RIGHT, Constants::NONE, RIGHT.with(Constants::LEFT, true)] {
            let loaded = forms.get(calls, kernel, constants, 0, Specialise::AtFirstUse).unwrap();
            assert_eq!(loaded.form, Form::of(constants));
        }
        COUNTS.get()
    };
    let all = thread::scope(|scope| {
        let threads: Vec<_> = (0..8).map(|_| scope.spawn(work)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
    });
    // A form that two threads have loaded is unloaded once.
    let kept: u32 = all.iter().map(|counts| counts.cubins + counts.compiled - counts.unloaded).sum();
    assert_eq!(kept, 4);
}
