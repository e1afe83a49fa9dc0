//! Products through cublasLt: explicit strides, f32 sums, a fixed workspace, and for each shape the
//! first algorithm that its heuristics name, so that a shape gives the same bits every time.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::c_void;
use std::ptr::null_mut;

use cudarc::cublaslt::sys as lt;
use cudarc::driver::sys;

use super::cuda::ok as driver_ok;
use super::gemm::{Epilogue, Gemm, Out};

/// Bytes of workspace: what NVIDIA recommends for Hopper.
const WORKSPACE: usize = 32 << 20;

/// An open handle.
pub struct Cublas {
    handle: lt::cublasLtHandle_t,
    /// One a stream.
    workspaces: [u64; 2],
    plans: RefCell<HashMap<Key, Plan>>,
}

/// What decides the algorithm.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    shape: [usize; 3],
    strides: [usize; 4],
    turned: [bool; 2],
    out: Out,
    add: bool,
    epilogue: u32,
    /// Of A, B, C and D: what their addresses are multiples of.
    alignment: [u32; 4],
}

struct Plan {
    desc: lt::cublasLtMatmulDesc_t,
    layouts: [lt::cublasLtMatrixLayout_t; 4],
    algo: lt::cublasLtMatmulAlgo_t,
}

fn ok(status: lt::cublasStatus_t, what: &str) -> Result<(), String> {
    match status {
        lt::cublasStatus_t::CUBLAS_STATUS_SUCCESS => Ok(()),
        status => Err(format!("{what}: {status:?}")),
    }
}

impl Cublas {
    /// Opens the library; the context is current.
    pub fn open() -> Result<Cublas, String> {
        // SAFETY: asks the loader only.
        if !unsafe { lt::is_culib_present() } {
            return Err("cuBLASLt (libcublasLt.so.13) was not found: install the CUDA libraries, \
                        or put their folder into LD_LIBRARY_PATH"
                .into());
        }
        let (mut handle, mut workspaces) = (null_mut(), [0; 2]);
        // SAFETY: plain calls in the order that the library asks for.
        unsafe {
            ok(lt::cublasLtCreate(&mut handle), "cublasLtCreate")?;
            for workspace in &mut workspaces {
                driver_ok(sys::cuMemAlloc_v2(workspace, WORKSPACE), "workspace of cublasLt")?;
            }
        }
        Ok(Cublas { handle, workspaces, plans: RefCell::default() })
    }

    /// Queues a product on `stream`, with its own workspace. Column-major to the library:
    /// Dᵀ = op(B)ᵀ · op(A)ᵀ.
    pub fn run(&self, g: &Gemm, stream: sys::CUstream, number: usize) -> Result<(), String> {
        let key = key(g);
        if !self.plans.borrow().contains_key(&key) {
            let plan = self.plan(g, &key)?;
            self.plans.borrow_mut().insert(key, plan);
        }
        let plans = self.plans.borrow();
        let plan = &plans[&key];
        if let Epilogue::Bias(at) | Epilogue::GeluBias(at) = g.epilogue {
            let name = lt::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_POINTER;
            set(plan.desc, name, &at)?;
        }
        let pointer = |at: u64| at as *const c_void;
        let [a, b, c, d] = plan.layouts;
        // SAFETY: the matrices lie in device memory that wrappers checked; descriptors are alive.
        let status = unsafe {
            lt::cublasLtMatmul(
                self.handle,
                plan.desc,
                (&raw const g.alpha).cast(),
                pointer(g.b.0),
                a,
                pointer(g.a.0),
                b,
                (&raw const g.beta).cast(),
                pointer(g.c.0),
                c,
                g.d.0 as *mut c_void,
                d,
                &plan.algo,
                self.workspaces[number] as *mut c_void,
                WORKSPACE,
                stream.cast(),
            )
        };
        ok(status, "cublasLtMatmul")
    }

    fn plan(&self, g: &Gemm, key: &Key) -> Result<Plan, String> {
        use lt::cublasLtMatmulDescAttributes_t as Name;
        let (compute, f32_) =
            (lt::cublasComputeType_t::CUBLAS_COMPUTE_32F, lt::cudaDataType_t::CUDA_R_32F);
        let half = lt::cudaDataType_t::CUDA_R_16BF;
        let out = if g.out == Out::F32 { f32_ } else { half };
        let mut desc = null_mut();
        // SAFETY: fills `desc`.
        ok(unsafe { lt::cublasLtMatmulDescCreate(&mut desc, compute, f32_) }, "descriptor")?;
        // CUBLAS_OP_N and CUBLAS_OP_T, which the bindings leave out.
        let turn = i32::from;
        set(desc, Name::CUBLASLT_MATMUL_DESC_TRANSA, &turn(g.b.2))?;
        set(desc, Name::CUBLASLT_MATMUL_DESC_TRANSB, &turn(g.a.2))?;
        let epilogue = match g.epilogue {
            Epilogue::None => lt::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_DEFAULT,
            Epilogue::Bias(_) => lt::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS,
            Epilogue::GeluBias(_) => lt::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_GELU_BIAS,
        };
        set(desc, Name::CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue)?;
        if let Epilogue::Bias(at) | Epilogue::GeluBias(at) = g.epilogue {
            set(desc, Name::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &at)?;
        }
        let layout = |kind, rows: usize, columns: usize, stride: usize| {
            let mut layout = null_mut();
            // SAFETY: fills `layout`.
            let status = unsafe {
                let (rows, columns) = (rows as u64, columns as u64);
                lt::cublasLtMatrixLayoutCreate(&mut layout, kind, rows, columns, stride as i64)
            };
            ok(status, "layout").map(|()| layout)
        };
        let stored = |rows, columns, turned| if turned { (columns, rows) } else { (rows, columns) };
        let ((ar, ac), (br, bc)) = (stored(g.m, g.k, g.a.2), stored(g.k, g.n, g.b.2));
        let layouts = [
            layout(half, bc, br, g.b.1)?,
            layout(half, ac, ar, g.a.1)?,
            layout(out, g.n, g.m, g.c.1)?,
            layout(out, g.n, g.m, g.d.1)?,
        ];
        let algo = self.choose(desc, layouts, key)?;
        Ok(Plan { desc, layouts, algo })
    }

    fn choose(
        &self,
        desc: lt::cublasLtMatmulDesc_t,
        [a, b, c, d]: [lt::cublasLtMatrixLayout_t; 4],
        key: &Key,
    ) -> Result<lt::cublasLtMatmulAlgo_t, String> {
        use lt::cublasLtMatmulPreferenceAttributes_t as Name;
        let mut preference = null_mut();
        // SAFETY: fills `preference`, which is destroyed below.
        unsafe {
            ok(lt::cublasLtMatmulPreferenceCreate(&mut preference), "preference")?;
            let set = |name, value: *const c_void, bytes| {
                ok(
                    lt::cublasLtMatmulPreferenceSetAttribute(preference, name, value, bytes),
                    "preference",
                )
            };
            let workspace = WORKSPACE as u64;
            let name = Name::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
            set(name, (&raw const workspace).cast(), 8)?;
            let names = [
                Name::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
                Name::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
                Name::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
                Name::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
            ];
            let [of_a, of_b, of_c, of_d] = key.alignment;
            for (name, bytes) in names.into_iter().zip([of_b, of_a, of_c, of_d]) {
                set(name, (&raw const bytes).cast(), 4)?;
            }
            let mut found: [lt::cublasLtMatmulHeuristicResult_t; 1] = std::mem::zeroed();
            let mut count = 0;
            let status = lt::cublasLtMatmulAlgoGetHeuristic(
                self.handle,
                desc,
                a,
                b,
                c,
                d,
                preference,
                1,
                found.as_mut_ptr(),
                &mut count,
            );
            lt::cublasLtMatmulPreferenceDestroy(preference);
            ok(status, "no algorithm for this product")?;
            if count == 0 {
                return Err("cublasLt has no algorithm for this product".into());
            }
            Ok(found[0].algo)
        }
    }
}

fn key(g: &Gemm) -> Key {
    let alignment = |at: u64| 1u32 << at.trailing_zeros().min(8);
    Key {
        shape: [g.m, g.n, g.k],
        strides: [g.a.1, g.b.1, g.c.1, g.d.1],
        turned: [g.a.2, g.b.2],
        out: g.out,
        add: g.beta != 0.0,
        epilogue: match g.epilogue {
            Epilogue::None => 0,
            Epilogue::Bias(_) => 1,
            Epilogue::GeluBias(_) => 2,
        },
        alignment: [g.a.0, g.b.0, g.c.0, g.d.0].map(alignment),
    }
}

fn set<T>(
    desc: lt::cublasLtMatmulDesc_t,
    name: lt::cublasLtMatmulDescAttributes_t,
    value: &T,
) -> Result<(), String> {
    // SAFETY: `value` is of the attribute's type and is copied.
    let status = unsafe {
        let at = std::ptr::from_ref(value).cast();
        lt::cublasLtMatmulDescSetAttribute(desc, name, at, size_of::<T>())
    };
    ok(status, "descriptor")
}

impl Drop for Cublas {
    fn drop(&mut self) {
        // SAFETY: everything was made by this value.
        unsafe {
            for plan in self.plans.borrow().values() {
                for layout in plan.layouts {
                    lt::cublasLtMatrixLayoutDestroy(layout);
                }
                lt::cublasLtMatmulDescDestroy(plan.desc);
            }
            self.workspaces.iter().for_each(|at| _ = sys::cuMemFree_v2(*at));
            lt::cublasLtDestroy(self.handle);
        }
    }
}
