//! The driver as a framework uses it next to ferroflash: contexts, streams and graphs of its own.

use std::ffi::{c_int, c_uint, c_void};
use std::ptr;
use std::sync::OnceLock;

use ferroflash::cuda::RawStream;

type Handle = *mut c_void;

const NON_BLOCKING: c_uint = 1;
const CAPTURE_THREAD_LOCAL: c_uint = 1;

macro_rules! calls {
    ($($name:ident($($parameter:ty),*);)*) => {
        #[allow(non_snake_case)]
        struct Calls {
            $($name: unsafe extern "C" fn($($parameter),*) -> u32,)*
        }

        fn calls() -> &'static Calls {
            static CALLS: OnceLock<Calls> = OnceLock::new();
            CALLS.get_or_init(|| {
                // SAFETY: the driver may be loaded at any time, and the types are cuda.h's.
                unsafe {
                    let driver = Box::leak(Box::new(libloading::Library::new("libcuda.so.1").unwrap()));
                    Calls { $($name: *driver.get(concat!(stringify!($name), "\0").as_bytes()).unwrap(),)* }
                }
            })
        }
    };
}

calls! {
    cuCtxGetCurrent(*mut Handle);
    cuCtxSetCurrent(Handle);
    cuCtxCreate_v2(*mut Handle, c_uint, c_int);
    cuCtxDestroy_v2(Handle);
    cuCtxPopCurrent_v2(*mut Handle);
    cuDevicePrimaryCtxRetain(*mut Handle, c_int);
    cuDevicePrimaryCtxRelease_v2(c_int);
    cuStreamCreate(*mut Handle, c_uint);
    cuStreamDestroy_v2(Handle);
    cuStreamSynchronize(Handle);
    cuStreamBeginCapture_v2(Handle, c_uint);
    cuStreamEndCapture(Handle, *mut Handle);
    cuGraphInstantiateWithFlags(*mut Handle, Handle, u64);
    cuGraphDestroy(Handle);
    cuGraphLaunch(Handle, Handle);
    cuGraphExecDestroy(Handle);
}

fn check(call: &str, code: u32) {
    assert_eq!(code, 0, "{call}");
}

/// Returns the calling thread's current context.
pub fn current() -> Handle {
    let mut context = ptr::null_mut();
    // SAFETY: writes one handle.
    check("cuCtxGetCurrent", unsafe { (calls().cuCtxGetCurrent)(&mut context) });
    context
}

/// The primary context of a device, current until this value is dropped.
pub struct Primary {
    ordinal: u32,
    before: Handle,
}

impl Primary {
    pub fn enter(ordinal: u32) -> Self {
        let (before, mut context) = (current(), ptr::null_mut());
        // SAFETY: writes one handle, of a context that stays retained until `drop`.
        unsafe {
            check("cuDevicePrimaryCtxRetain", (calls().cuDevicePrimaryCtxRetain)(&mut context, ordinal as c_int));
            check("cuCtxSetCurrent", (calls().cuCtxSetCurrent)(context));
        }
        Primary { ordinal, before }
    }
}

impl Drop for Primary {
    fn drop(&mut self) {
        // SAFETY: the context before is still live; the primary one was retained by `enter`.
        unsafe {
            let _ = (calls().cuCtxSetCurrent)(self.before);
            let _ = (calls().cuDevicePrimaryCtxRelease_v2)(self.ordinal as c_int);
        }
    }
}

/// A context of a framework's own, which is current nowhere at first.
pub struct Context(Handle);

impl Context {
    pub fn new(ordinal: u32) -> Self {
        let (mut context, mut popped) = (ptr::null_mut(), ptr::null_mut());
        // SAFETY: each writes one handle; creating a context makes it current, and popping undoes that.
        unsafe {
            check("cuCtxCreate", (calls().cuCtxCreate_v2)(&mut context, 0, ordinal as c_int));
            check("cuCtxPopCurrent", (calls().cuCtxPopCurrent_v2)(&mut popped));
        }
        Context(context)
    }

    /// Makes it the thread's current context.
    pub fn make_current(&self) -> Handle {
        // SAFETY: the context is live.
        check("cuCtxSetCurrent", unsafe { (calls().cuCtxSetCurrent)(self.0) });
        self.0
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: made by `new`, used no more; a thread without a current context is one that has null.
        unsafe {
            let _ = (calls().cuCtxSetCurrent)(ptr::null_mut());
            let _ = (calls().cuCtxDestroy_v2)(self.0);
        }
    }
}

/// Waits for all work of the default stream, copies to the device included, because a non-blocking stream does not wait
/// for it.
pub fn wait_for_default_stream() {
    // SAFETY: null is the default stream of the current context.
    check("cuStreamSynchronize", unsafe { (calls().cuStreamSynchronize)(ptr::null_mut()) });
}

/// A non-blocking stream of the current context.
pub struct Stream(Handle);

impl Stream {
    pub fn new() -> Self {
        let mut stream = ptr::null_mut();
        // SAFETY: writes one handle.
        check("cuStreamCreate", unsafe { (calls().cuStreamCreate)(&mut stream, NON_BLOCKING) });
        Stream(stream)
    }

    pub fn raw(&self) -> RawStream {
        self.0
    }

    /// Waits until all work of the stream is done.
    pub fn wait(&self) {
        // SAFETY: the handle is live.
        check("cuStreamSynchronize", unsafe { (calls().cuStreamSynchronize)(self.0) });
    }

    /// Captures the launches of `work` on this stream as a graph.
    pub fn capture(&self, work: impl FnOnce(RawStream)) -> Graph {
        let (mut graph, mut executable) = (ptr::null_mut(), ptr::null_mut());
        // SAFETY: the stream is live and idle, its capture begins and ends on this thread, and each call writes one
        // handle; the executable graph does not need the captured one.
        unsafe {
            check("cuStreamBeginCapture", (calls().cuStreamBeginCapture_v2)(self.0, CAPTURE_THREAD_LOCAL));
            work(self.0);
            check("cuStreamEndCapture", (calls().cuStreamEndCapture)(self.0, &mut graph));
            check("cuGraphInstantiateWithFlags", (calls().cuGraphInstantiateWithFlags)(&mut executable, graph, 0));
            check("cuGraphDestroy", (calls().cuGraphDestroy)(graph));
        }
        Graph(executable)
    }

    /// Runs a graph after the earlier work of the default stream, and waits for it.
    pub fn run(&self, graph: &Graph) {
        wait_for_default_stream();
        // SAFETY: both handles are live.
        check("cuGraphLaunch", unsafe { (calls().cuGraphLaunch)(graph.0, self.0) });
        self.wait();
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // SAFETY: made by `new`, used no more.
        let _ = unsafe { (calls().cuStreamDestroy_v2)(self.0) };
    }
}

/// A graph that can be launched.
pub struct Graph(Handle);

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: made by `Stream::capture`, used no more.
        let _ = unsafe { (calls().cuGraphExecDestroy)(self.0) };
    }
}
